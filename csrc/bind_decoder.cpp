/* Pages and decoders for the Python module: records of addresses, made once, whose arrays the caller keeps. */
#include <memory>
#include <vector>

#include "bind.h"

namespace {

struct Pages {
    bw_pages record;

    Pages(int64_t count, int64_t page, int64_t heads, int64_t dimension, int32_t key_code, int32_t value_code,
          int32_t key_rotated, int32_t value_rotated, uintptr_t keys, uintptr_t values, uintptr_t key_scale, uintptr_t value_scale)
        : record{count, page, heads, dimension, key_code, value_code, key_rotated, value_rotated, address<void>(keys),
                 address<void>(values), address<float>(key_scale), address<float>(value_scale)} {}
};

struct Batch {
    bw_batch record;

    Batch(int64_t tokens, int64_t sequences, int64_t most_pages, uintptr_t positions, uintptr_t starts, uintptr_t lengths,
          uintptr_t pages)
        : record{tokens, sequences, most_pages, address<const int32_t>(positions), address<const int32_t>(starts),
                 address<const int32_t>(lengths), address<const int32_t>(pages)} {}
};

/* A linear layer; the weight is kept alive by whoever made it. */
struct Dense {
    bw_dense record;

    Dense(const Weight& weight, uintptr_t bias, uintptr_t input_scale, int32_t activation_bits, int32_t activation_group)
        : record{&weight.record, address<const float>(bias), address<const float>(input_scale), activation_bits, activation_group} {}
};

struct Layer {
    bw_layer record;

    Layer(uintptr_t attention_norm, uintptr_t mlp_norm, uintptr_t query_norm, uintptr_t key_norm, const Dense& query,
          const Dense& key, const Dense& value, const Dense& output, const Dense& gate, const Dense& up, const Dense& down,
          int64_t window)
        : record{address<const float>(attention_norm), address<const float>(mlp_norm), address<const float>(query_norm),
                 address<const float>(key_norm), query.record, key.record, value.record, output.record, gate.record,
                 up.record, down.record, window} {}
};

struct Decoder {
    std::vector<bw_layer> layers;
    bw_decoder record{};

    Decoder(const std::vector<const Layer*>& made, const Dense& head) {
        for (const Layer* layer : made) layers.push_back(layer->record);
        record.layers = layers.data();
        record.layer_count = static_cast<int64_t>(layers.size());
        record.head = head.record;
    }

    void set_sizes(int64_t hidden, int64_t intermediate, int64_t heads, int64_t kv_heads, int64_t dimension,
                   int64_t vocabulary, float epsilon, float score_scale, bool are_halves) {
        record.hidden = hidden;
        record.intermediate = intermediate;
        record.heads = heads;
        record.kv_heads = kv_heads;
        record.dimension = dimension;
        record.vocabulary = vocabulary;
        record.epsilon = epsilon;
        record.score_scale = score_scale;
        record.are_halves = are_halves;
    }

    void set_ends(const Weight* embedding, uintptr_t rows, int32_t dtype, uintptr_t final_norm) {
        record.embedding = embedding ? &embedding->record : nullptr;
        record.embedding_rows = address<const void>(rows);
        record.embedding_dtype = dtype;
        record.final_norm = address<const float>(final_norm);
    }

    void step(const Batch& batch, uintptr_t ids, uintptr_t outputs, int64_t output_count, uintptr_t cosine, uintptr_t sine,
              int64_t position_count, const std::vector<const Pages*>& pages, uintptr_t logits, int32_t threads) const {
        if (pages.size() != layers.size()) throw nb::value_error("one record of pages is needed for each layer");
        std::vector<bw_pages> records;
        for (const Pages* each : pages) records.push_back(each->record);
        bw_step step{batch.record, address<const int64_t>(ids), address<const int32_t>(outputs), output_count, position_count,
                     address<const float>(cosine), address<const float>(sine), records.data()};
        nb::gil_scoped_release release;
        check(bw_decode_step(&record, &step, address<float>(logits), threads));
    }
};

void write_pages(const Pages& pages, const Batch& batch, uintptr_t keys, uintptr_t values, int32_t threads) {
    nb::gil_scoped_release release;
    check(bw_write_pages(&pages.record, &batch.record, address<const float>(keys), address<const float>(values), threads));
}

void attend(const Pages& pages, const Batch& batch, uintptr_t queries, int64_t heads, float scale, int64_t window,
            uintptr_t output, int32_t threads) {
    nb::gil_scoped_release release;
    check(bw_attend(&pages.record, &batch.record, address<const float>(queries), heads, scale, window,
                    address<float>(output), threads));
}

/* Lists of records as pointers into them; the list keeps its members alive during the call. */
template <class T> std::vector<const T*> members(const nb::list& list) {
    std::vector<const T*> found;
    for (nb::handle item : list) found.push_back(nb::inst_ptr<T>(item));
    return found;
}

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<Pages>(m, "Pages")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, int32_t, uintptr_t, uintptr_t, uintptr_t,
                      uintptr_t>());
    nb::class_<Batch>(m, "Batch")
        .def(nb::init<int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>());
    nb::class_<Dense>(m, "Dense")
        .def(nb::init<const Weight&, uintptr_t, uintptr_t, int32_t, int32_t>(), nb::keep_alive<1, 2>());
    nb::class_<Layer>(m, "Layer")
        .def(nb::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, const Dense&, const Dense&, const Dense&, const Dense&,
                      const Dense&, const Dense&, const Dense&, int64_t>(),
             nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>(),
             nb::keep_alive<1, 10>(), nb::keep_alive<1, 11>(), nb::keep_alive<1, 12>());
    nb::class_<Decoder>(m, "Decoder")
        .def("__init__", [](Decoder* self, const nb::list& layers, const Dense& head) {
                for (nb::handle layer : layers)
                    if (!nb::isinstance<Layer>(layer)) throw nb::type_error("a list of layers is needed");
                new (self) Decoder(members<Layer>(layers), head);
            }, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("set_sizes", &Decoder::set_sizes)
        .def("set_ends", &Decoder::set_ends, nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::keep_alive<1, 2>())
        .def("step", [](const Decoder& self, const Batch& batch, uintptr_t ids, uintptr_t outputs, int64_t output_count,
                        uintptr_t cosine, uintptr_t sine, int64_t position_count, const nb::list& pages, uintptr_t logits,
                        int32_t threads) {
            for (nb::handle each : pages)
                if (!nb::isinstance<Pages>(each)) throw nb::type_error("a list of pages is needed");
            self.step(batch, ids, outputs, output_count, cosine, sine, position_count, members<Pages>(pages), logits, threads);
        });
    m.def("write_pages", write_pages);
    m.def("attend", attend);
}
