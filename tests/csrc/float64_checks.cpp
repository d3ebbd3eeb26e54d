/* Every instruction set that this processor has, against sums in float64: products, attention, layers, grids.
 *
 *     float64_checks ROUNDS SEED [ISA ...]
 *
 * With names, exactly those sets must be there. Runs under emulators too: it needs nothing but the library. */
#include <cmath>
#include <cstring>
#include <string>

#include "rounds.h"

namespace {

std::string place; /* what is being checked, for messages */

float number(double scale = 1) { return static_cast<float>(std::normal_distribution<double>(0, scale)(generator)); }

std::vector<float> numbers(int64_t count, double scale = 1) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& each : made) each = number(scale);
    return made;
}

void near(double found, double expected, double tolerance, const char* what) {
    if (std::abs(found - expected) <= tolerance) return;
    std::fprintf(stderr, "%s, %s: %.9g where %.9g is right, within %.3g\n", place.c_str(), what, found, expected, tolerance);
    std::exit(1);
}

float as_float(uint16_t bfloat) {
    uint32_t word = static_cast<uint32_t>(bfloat) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

uint16_t as_bfloat(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

/* Some tokens, in float32 or bfloat16. */
struct Tokens {
    std::vector<float> values;
    std::vector<uint16_t> halves;
    int32_t dtype;

    Tokens(int64_t count, bool are_halves) : values(numbers(count)), dtype(are_halves ? BW_BFLOAT16 : BW_FLOAT32) {
        for (float& value : values) {
            halves.push_back(as_bfloat(value));
            if (are_halves) value = as_float(halves.back());
        }
    }
    const void* data() const { return dtype == BW_BFLOAT16 ? static_cast<const void*>(halves.data()) : values.data(); }
};

/* A token rounded to int8 as bw_linear promises, with a scale for each `part` numbers. */
std::vector<double> rounded(const float* x, int64_t columns, int64_t part) {
    std::vector<double> found;
    for (int64_t first = 0; first < columns; first += part) {
        int64_t end = std::min(columns, first + part);
        float most = 0;
        for (int64_t c = first; c < end; c++) most = std::max(most, std::abs(x[c]));
        float scale = most / 127;
        for (int64_t c = first; c < end; c++)
            found.push_back(std::min(127.0, std::max(-128.0, double(std::nearbyint(x[c] / scale)))) * scale);
    }
    return found;
}

void check_linear() {
    int64_t rows = draw(1, 150), columns = draw(1, 300), tokens = draw(1, draw(0, 3) ? 8 : 30), group = 32 * draw(1, 5);
    int64_t slots = (columns + 31) / 32 * 32, groups = (slots + group - 1) / group, cells = (rows + 63) / 64 * groups * 64;
    int32_t bits = static_cast<int32_t>(draw(2, 8)), center = 1 << (bits - 1);
    bool has_zero = draw(0, 1), has_remainder = has_zero && draw(0, 1), has_levels = bits <= 4 && !has_zero && draw(0, 2) == 0;
    std::vector<uint8_t> codes(static_cast<size_t>(rows * columns)), packed(bw_codes_bytes(rows, slots, bits));
    for (auto& code : codes) code = static_cast<uint8_t>(draw(0, (1 << bits) - 1));
    require(bw_pack_codes(codes.data(), rows, columns, slots, bits, nullptr, packed.data(), 1) == BW_OK, "packing");
    std::vector<float> scale = numbers(cells), remainder = numbers(cells, 0.3), levels = numbers(16), bias = numbers(rows);
    std::vector<uint8_t> zero(static_cast<size_t>(cells));
    for (auto& each : zero) each = static_cast<uint8_t>(draw(0, (1 << bits) - 1));
    bw_weight w{rows, columns, slots, group, bits, center, BW_FLOAT32, 0, packed.data(), scale.data(),
                has_zero ? zero.data() : nullptr, has_remainder ? remainder.data() : nullptr, nullptr,
                has_levels ? levels.data() : nullptr};
    int32_t activation = !has_levels && draw(0, 1) ? 8 : 16;
    int32_t part = activation == 16 || draw(0, 1) ? 0 : draw(0, 1) ? 32 : static_cast<int32_t>(group * draw(1, 2));
    Tokens x(tokens * columns, activation == 16 && draw(0, 1));
    std::vector<float> y(static_cast<size_t>(tokens * rows));
    std::vector<uint16_t> y_halves(y.size());
    bool are_halves = x.dtype == BW_BFLOAT16;
    void* to = are_halves ? static_cast<void*>(y_halves.data()) : y.data();
    require(bw_linear(&w, x.data(), x.dtype, tokens, are_halves ? nullptr : bias.data(), activation, part, to, 2) == BW_OK, "bw_linear");
    for (int64_t t = 0; t < tokens; t++) {
        std::vector<double> own(x.values.begin() + t * columns, x.values.begin() + (t + 1) * columns);
        if (activation == 8) own = rounded(&x.values[static_cast<size_t>(t * columns)], columns, part ? part : columns);
        for (int64_t r = 0; r < rows; r++) {
            double sum = are_halves ? 0 : bias[static_cast<size_t>(r)], size = std::abs(sum);
            for (int64_t c = 0; c < columns; c++) {
                size_t cell = static_cast<size_t>((r / 64 * groups + c / group) * 64 + r % 64);
                int code = codes[static_cast<size_t>(r * columns + c)];
                double value = has_levels ? levels[static_cast<size_t>(code)] : code - (has_zero ? zero[cell] : center);
                if (has_remainder) value -= remainder[cell];
                sum += value * scale[cell] * own[static_cast<size_t>(c)];
                size += (std::abs(value) + (1 << bits)) * std::abs(scale[cell] * own[static_cast<size_t>(c)]);
            }
            size_t at = static_cast<size_t>(t * rows + r);
            near(are_halves ? as_float(y_halves[at]) : y[at], sum, 2e-6 * size + (are_halves ? 0.004 * std::abs(sum) : 0), "bw_linear");
        }
    }
}

/* Keys or values in pages, as what was stored in them says. */
struct Storage {
    int32_t code;
    int64_t dimension;
    std::vector<uint8_t> bytes;
    std::vector<float> scale;

    Storage(int32_t kind, int64_t cells, int64_t size)
        : code(kind), dimension(size), bytes(static_cast<size_t>(cells * size * (kind == BW_FLOAT32 ? 8 : kind == BW_BFLOAT16 ? 4 : kind == BW_INT8 ? 2 : 1) / 2)),
          scale(static_cast<size_t>(cells * 2)) {}
    double at(int64_t cell, int64_t d) const {
        int64_t i = cell * dimension + d;
        if (code == BW_BFLOAT16) return as_float(reinterpret_cast<const uint16_t*>(bytes.data())[i]);
        if (code == BW_FLOAT32) return reinterpret_cast<const float*>(bytes.data())[i];
        int number = code == BW_INT8 ? bytes[static_cast<size_t>(i)] : bytes[static_cast<size_t>(i / 2)] >> (d % 2 * 4) & 15;
        return double(number) * scale[static_cast<size_t>(2 * cell)] + scale[static_cast<size_t>(2 * cell + 1)];
    }
};

void check_attention() {
    static const int32_t kinds[] = {BW_FLOAT32, BW_BFLOAT16, BW_INT8, BW_INT4};
    int64_t heads = draw(1, 2), group = draw(1, 9), dimension = draw(0, 2) ? 64 * draw(1, 2) : 2 * draw(1, 40), page = 32;
    int64_t length = draw(1, draw(0, 2) ? 60 : 700), fresh = draw(1, std::min<int64_t>(length, 4)), count = (length + page - 1) / page;
    int32_t key = kinds[draw(0, 3)], value = key == BW_INT8 && draw(0, 1) ? BW_INT4 : key;
    Storage keys(key, count * heads * page, dimension), values(value, count * heads * page, dimension);
    bw_pages pages{count, page, heads, dimension, key, value, 0, 0, keys.bytes.data(), values.bytes.data(), keys.scale.data(), values.scale.data()};
    std::vector<int32_t> positions, table, starts{0, static_cast<int32_t>(length)}, lengths{static_cast<int32_t>(length)};
    for (int64_t i = 0; i < length; i++) positions.push_back(static_cast<int32_t>(i));
    for (int64_t i = 0; i < count; i++) table.push_back(static_cast<int32_t>(count - 1 - i));
    bw_batch batch{length, 1, count, positions.data(), starts.data(), lengths.data(), table.data()};
    std::vector<float> new_keys = numbers(length * heads * dimension), new_values = numbers(length * heads * dimension);
    require(bw_write_pages(&pages, &batch, new_keys.data(), new_values.data(), 1) == BW_OK, "bw_write_pages");
    batch.tokens = fresh;
    batch.positions += length - fresh;
    starts[1] = static_cast<int32_t>(fresh);
    std::vector<float> queries = numbers(fresh * heads * group * dimension), output(queries.size());
    int64_t window = draw(0, 1) ? draw(1, 300) : 0;
    float scale = 1 / std::sqrt(static_cast<float>(dimension));
    require(bw_attend(&pages, &batch, queries.data(), heads * group, scale, window, output.data(), 2) == BW_OK, "bw_attend");
    for (int64_t row = 0; row < fresh * heads * group; row++) {
        int64_t end = length - fresh + row / (heads * group) + 1, begin = window && end > window ? end - window : 0;
        int64_t head = row % (heads * group) / group;
        auto cell = [&](int64_t j) { return (table[static_cast<size_t>(j / page)] * heads + head) * page + j % page; };
        std::vector<double> weights, sums(static_cast<size_t>(dimension));
        double most = -1e300, total = 0;
        for (int64_t j = begin; j < end; j++) {
            double score = 0;
            for (int64_t d = 0; d < dimension; d++) score += queries[static_cast<size_t>(row * dimension + d)] * keys.at(cell(j), d);
            weights.push_back(score * scale);
            most = std::max(most, weights.back());
        }
        for (double& weight : weights) total += weight = std::exp(weight - most);
        for (int64_t j = begin; j < end; j++)
            for (int64_t d = 0; d < dimension; d++)
                sums[static_cast<size_t>(d)] += weights[static_cast<size_t>(j - begin)] / total * values.at(cell(j), d);
        for (int64_t d = 0; d < dimension; d++)
            near(output[static_cast<size_t>(row * dimension + d)], sums[static_cast<size_t>(d)], key >= BW_INT8 ? 4e-4 : 1e-5, "bw_attend");
    }
}

/* A norm on its way into a product, of exact and of rounded tokens, is the norm and then the product. */
void check_norm_linear(bw_norm norm) {
    int64_t rows = draw(1, 80), columns = norm.columns, slots = (columns + 31) / 32 * 32;
    std::vector<uint8_t> codes(bw_codes_bytes(rows, slots, 8));
    for (auto& code : codes) code = static_cast<uint8_t>(draw(0, 255));
    std::vector<float> scale = numbers((rows + 63) / 64 * 64), y(static_cast<size_t>(rows)), expected(y.size());
    bw_weight w{rows, columns, slots, slots, 8, 128, BW_FLOAT32, 0, codes.data(), scale.data(), nullptr, nullptr, nullptr, nullptr};
    for (int32_t part : {-1, 0, 32}) { /* -1: exact activations */
        int32_t activation = part < 0 ? 16 : 8, size = part < 0 ? 0 : part;
        require(bw_norm_linear(&norm, &w, 1, nullptr, activation, size, y.data(), 2) == BW_OK, "bw_norm_linear");
        require(bw_linear(&w, norm.y, BW_FLOAT32, 1, nullptr, activation, size, expected.data(), 2) == BW_OK, "bw_linear");
        for (size_t r = 0; r < y.size(); r++) near(y[r], expected[r], 0, "bw_norm_linear");
    }
}

void check_layers() {
    int64_t columns = draw(1, 100);
    std::vector<float> x = numbers(columns), residual = numbers(columns), weight = numbers(columns), sum(x.size()), y(x.size());
    bw_norm norm{x.data(), residual.data(), weight.data(), sum.data(), y.data(), columns, BW_FLOAT32, 1e-5f};
    require(bw_rms_norm(&norm, 1, 1) == BW_OK, "bw_rms_norm");
    double squares = 0;
    for (size_t c = 0; c < x.size(); c++) squares += std::pow(double(x[c]) + residual[c], 2);
    for (size_t c = 0; c < x.size(); c++)
        near(y[c], (double(x[c]) + residual[c]) / std::sqrt(squares / static_cast<double>(columns) + 1e-5) * weight[c], 1e-5, "bw_rms_norm");
    check_norm_linear(norm);
    require(bw_silu_multiply(x.data(), residual.data(), BW_FLOAT32, columns, y.data(), 1) == BW_OK, "bw_silu_multiply");
    for (size_t c = 0; c < x.size(); c++) near(y[c], x[c] / (1 + std::exp(-double(x[c]))) * residual[c], 1e-5, "bw_silu_multiply");
}

/* Numbers to codes with offsets and back, what a gradient says of the parts, and the same of a scaled weight. */
void check_grid() {
    int64_t rows = draw(1, 4), columns = draw(1, 100), group = draw(1, columns), groups = (columns + group - 1) / group;
    bool are_halves = draw(0, 1);
    auto cells = static_cast<size_t>(rows * columns), parts = static_cast<size_t>(rows * groups);
    Tokens x(rows * columns, are_halves), pull(rows * columns, are_halves);
    std::vector<float> scale = numbers(static_cast<int64_t>(parts), 0.3), zero(parts), offset = numbers(rows * columns, 0.2);
    std::vector<float> low(parts), high(parts), by_scale(parts), by_zero(parts), decoded(cells);
    for (float& each : scale) each = std::abs(each) + 0.05f;
    for (float& each : zero) each = static_cast<float>(draw(0, 15));
    std::vector<uint8_t> codes(cells);
    bw_grid g{rows, columns, group, x.dtype, 0, 15, 1, x.data(), scale.data(), zero.data(), offset.data(), low.data(),
              high.data(), codes.data(), decoded.data()};
    require(bw_find_ranges(&g, 2) == BW_OK && bw_encode(&g, 2) == BW_OK, "bw_encode");
    std::vector<float> before = offset;
    require(bw_step_offsets(&g, pull.data(), 0.125f, by_scale.data(), by_zero.data(), 2) == BW_OK, "bw_step_offsets");
    g.dtype = BW_FLOAT32;
    require(bw_decode(&g, 2) == BW_OK, "bw_decode");
    for (size_t p = 0; p < parts; p++) {
        size_t row = p / static_cast<size_t>(groups), start = p % static_cast<size_t>(groups) * static_cast<size_t>(group);
        size_t end = std::min(start + static_cast<size_t>(group), static_cast<size_t>(columns));
        double least = 1e300, most = -1e300, of_scale = 0, of_zero = 0;
        for (size_t c = start; c < end; c++) {
            size_t i = row * static_cast<size_t>(columns) + c;
            double value = x.values[i], free = value / scale[p] + before[i] + zero[p], code = codes[i], up = pull.values[i];
            least = std::min(least, value), most = std::max(most, value);
            near(code, std::min(15.0, std::max(0.0, free)), 0.5001, "bw_encode");
            near(decoded[i], (code - zero[p]) * scale[p], 1e-5, "bw_decode");
            bool is_clamped = free < -0.5 || free > 15.5;
            double to = is_clamped || up == 0 ? before[i] : up > 0 ? before[i] - 0.125 : before[i] + 0.125;
            near(offset[i], std::min(0.5, std::max(-0.5, to)), 1e-6, "bw_step_offsets");
            of_scale += up * (code - zero[p] - (is_clamped ? 0 : value / scale[p]));
            of_zero -= is_clamped ? up * scale[p] : 0;
        }
        near(low[p], least, 0, "bw_find_ranges");
        near(high[p], most, 0, "bw_find_ranges");
        near(by_scale[p], of_scale, 1e-2, "by_scale");
        near(by_zero[p], of_zero, 1e-3, "by_zero");
    }
}

void check_scaling() {
    int64_t rows = draw(1, 4), columns = draw(1, 100);
    auto cells = static_cast<size_t>(rows * columns), wide = static_cast<size_t>(columns);
    std::vector<float> w = numbers(rows * columns), q = numbers(rows * columns), pull = numbers(rows * columns), scaled(cells);
    std::vector<float> scale = numbers(columns), divisor(static_cast<size_t>(rows), 1.5f), by_scale(wide), by_divisor(divisor);
    for (float& each : scale) each = std::abs(each) + 0.1f;
    bw_scaling s{rows, columns, columns, BW_FLOAT32, BW_RANGE_WIDTH, w.data(), scale.data(), divisor.data()};
    require(bw_scale_weight(&s, scaled.data(), 2) == BW_OK, "bw_scale_weight");
    require(bw_scaling_gradient(&s, q.data(), pull.data(), by_scale.data(), by_divisor.data(), 2) == BW_OK, "gradient");
    std::vector<double> of_scale(wide);
    for (size_t r = 0; r < static_cast<size_t>(rows); r++) {
        const float *v = &scaled[r * wide], *up = &pull[r * wide], *to = &q[r * wide];
        double along = 0, turned = 0;
        size_t high = 0, low = 0;
        for (size_t c = 0; c < wide; c++) {
            near(v[c], double(w[r * wide + c]) * scale[c] / divisor[r], 1e-5, "bw_scale_weight");
            along += up[c] * (double(to[c]) - v[c]), turned += double(up[c]) * to[c];
            high = v[c] > v[high] ? c : high, low = v[c] < v[low] ? c : low;
        }
        double width = double(v[high]) - v[low], share = width > 0 ? along / width : 0;
        for (size_t c = 0; c < wide; c++) of_scale[c] += up[c] * double(w[r * wide + c]) / divisor[r];
        of_scale[high] += share * w[r * wide + high] / divisor[r];
        of_scale[low] -= share * w[r * wide + low] / divisor[r];
        near(by_divisor[r], -turned / divisor[r], 1e-3, "by_divisor");
    }
    for (size_t c = 0; c < wide; c++) near(by_scale[c], of_scale[c], 1e-3 * (1 + std::abs(of_scale[c])), "by_scale");
}

}  // namespace

int main(int count, char** arguments) {
    long rounds = count > 1 ? std::atol(arguments[1]) : 100;
    generator.seed(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1);
    std::vector<std::string> names(arguments + (count > 3 ? 3 : count), arguments + count);
    if (names.empty())
        for (int i = 0; i < bw_isa_count(); i++)
            if (bw_isa_is_supported(i)) names.emplace_back(bw_isa_name(i));
    for (const std::string& name : names) {
        require(bw_isa_select(name.c_str()) == BW_OK, name.c_str());
        place = name;
        for (long round = 0; round < rounds; round++) {
            check_linear();
            check_attention();
            check_layers();
            check_grid();
            check_scaling();
        }
        std::printf("%s: %ld rounds\n", name.c_str(), rounds);
    }
}
