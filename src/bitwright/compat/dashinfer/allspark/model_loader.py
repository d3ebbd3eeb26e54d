"""A model of Hugging Face's form, quantized as DashInfer's arguments say, for an engine to install."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from bitwright.compat.dashinfer.adaptation import Adaptation, adapt, load, serialize
from bitwright.compat.dashinfer.allspark.generation_config import GenerationConfigBuilder
from bitwright.compat.dashinfer.allspark.names import TargetDevice
from bitwright.compat.dashinfer.allspark.runtime_config import RuntimeConfig, RuntimeConfigBuilder
from bitwright.core.errors import ArgumentError
from bitwright.engine.options import check_count
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.directory import find_file, read_object
from bitwright.models.hf import PreTrainedModel, Tokenizer, context_length, load_tokenizer, read_config
from bitwright.models.location import resolve_model

__all__ = ["HuggingFaceModel"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GENERATION_LIMIT = 1 << 20
GENERATION = ("temperature", "top_k", "top_p", "repetition_penalty", "do_sample")


class HuggingFaceModel:
    """Opens a model, and keeps what was made of it until an engine has it.

    Args:
        hf_model_path: a directory, an id on the hub, or ``demo:``.
        safe_model_name: by which the engine will know the model.
        user_set_data_type: float32, float16 or bfloat16: of everything that is not quantized; as stored if not given.
        in_memory_serialize: keep the quantized model in memory, instead of writing it to a directory.
        trust_remote_code: taken and not used: code shipped with a model is never run.

    Raises:
        ArgumentError: BW201 for an argument.
        BitwrightError: BW301, BW504 if there is no such model.
    """

    def __init__(
        self,
        hf_model_path: str | Path,
        safe_model_name: str,
        user_set_data_type: str | None = None,
        in_memory_serialize: bool = False,
        trust_remote_code: bool = True,
    ) -> None:
        if not isinstance(safe_model_name, str) or not safe_model_name or "/" in safe_model_name:
            what = f"safe_model_name is {safe_model_name!r}"
            raise ArgumentError("BW201", what, suggestion="a name that is not empty, without a slash")
        if user_set_data_type is not None and user_set_data_type not in DTYPES:
            what = f"user_set_data_type is {user_set_data_type!r}"
            raise ArgumentError("BW201", what, suggestion="accepted: " + ", ".join(DTYPES))
        self.name = safe_model_name
        self.directory = resolve_model(hf_model_path)
        self._in_memory = in_memory_serialize
        self._dtype = None if user_set_data_type is None else DTYPES[user_set_data_type]
        self._config: Any = None
        self._tokenizer: Tokenizer | None = None
        self._adaptation: Adaptation | None = None
        self._serialized: PreTrainedModel | Path | None = None

    def load_model(self) -> Self:
        """Open the model and check its files; weights are read when it is serialized.

        Raises:
            BitwrightError: what opening a checkpoint raises.
        """
        self._config = read_config(open_checkpoint(self.directory))
        return self

    def serialize(
        self,
        engine: object,
        model_output_dir: str | Path = ".",
        enable_quant: bool = False,
        weight_only_quant: bool | None = None,
        customized_quant_config: Mapping[str, Any] | None = None,
        skip_if_exists: bool = False,
    ) -> Self:
        """Choose the numbers that the model runs in, and make it so: in memory, or below ``model_output_dir``.

        ``engine`` is taken and not used. All arguments are checked before a weight is read.

        Raises:
            BitwrightError: as :func:`bitwright.compat.dashinfer.adapt`; BW203 if the output is there already, unless
                ``skip_if_exists``.
        """
        if self._config is None:
            raise ArgumentError("BW201", "the model is not loaded", suggestion="load_model() first")
        quantization: dict[str, Any] = {
            "enable_quant": enable_quant,
            "weight_only_quant": weight_only_quant,
            "customized_quant_config": customized_quant_config,
        }
        chosen = adapt(self.directory, **quantization)
        if self._in_memory or chosen.instant is None:
            self._serialized = load(self.directory, dtype=self._dtype, **quantization)
        else:
            output = Path(model_output_dir) / self.name
            if not (skip_if_exists and output.is_dir()):
                serialize(self.directory, output, **quantization)
            self._serialized = output
        self._adaptation = chosen
        return self

    def serialize_to_memory(self, engine: object, **quantization: Any) -> Self:
        """As :meth:`serialize`, whatever ``in_memory_serialize`` says."""
        self._in_memory = True
        return self.serialize(engine, **quantization)

    def serialize_to_path(self, engine: object, model_output_dir: str | Path, **quantization: Any) -> Self:
        """As :meth:`serialize`, whatever ``in_memory_serialize`` says."""
        self._in_memory = False
        return self.serialize(engine, model_output_dir, **quantization)

    def free_model(self) -> Self:
        """Let go of the model that was loaded; what was serialized of it stays."""
        return self

    def free_memory_serialize_file(self) -> Self:
        """Let go of what was serialized in memory; an engine that has installed it keeps it."""
        if self._in_memory:
            self._serialized = None
        return self

    @property
    def mode(self) -> str:
        """The numbers that the model runs in, in prompts and answers alike: A16W16, A16W8, A8W8, A16W4 or A8W4.

        Raises:
            ArgumentError: BW201 before :meth:`serialize`.
        """
        if self._adaptation is None:
            raise ArgumentError("BW201", "the model is not serialized", suggestion="serialize(...) first")
        return self._adaptation.mode

    @property
    def serialized(self) -> PreTrainedModel | Path | None:
        """What an engine installs: a model in memory, or its directory; ``None`` if there is none."""
        return self._serialized

    @property
    def data_type(self) -> torch.dtype | None:
        """What ``user_set_data_type`` chose."""
        return self._dtype

    def init_tokenizer(self) -> Self:
        """Read the tokenizer, once.

        Raises:
            BitwrightError: BW312 if there is none.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.directory)
        return self

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer, as transformers has it."""
        self.init_tokenizer()
        assert self._tokenizer is not None
        return self._tokenizer

    def create_reference_runtime_config_builder(
        self, model_name: str, target_device: TargetDevice, device_id_array: Sequence[int] = (0,), max_batch: int = 1
    ) -> RuntimeConfigBuilder:
        """A configuration to start from: the model's own context, and ``max_batch`` requests at once.

        Raises:
            ArgumentError: BW201 for an argument.
        """
        config = RuntimeConfig(
            model_name=model_name,
            loader=self,
            device=TargetDevice.CPU,
            device_ids=(0,),
            max_length=context_length(self._read_config()) or 2048,
            max_batch=check_count("max_batch", max_batch, 1),
        )
        return RuntimeConfigBuilder(config).model_name(model_name).compute_unit(target_device, device_id_array)

    def create_reference_generation_config_builder(self, runtime_config: RuntimeConfig) -> GenerationConfigBuilder:
        """The fields that the model's own ``generation_config.json`` has, and the engine's length.

        Raises:
            BitwrightError: BW307 if that file cannot be read.
        """
        context = context_length(self._read_config()) or runtime_config.max_length
        fields: dict[str, Any] = {"max_length": min(runtime_config.max_length, context)}
        path = find_file(self.directory, "generation_config.json")
        settings = {} if path is None else read_object(path, code="BW307", limit=GENERATION_LIMIT)
        fields.update({name: settings[name] for name in GENERATION if settings.get(name) is not None})
        return GenerationConfigBuilder(fields)

    def _read_config(self) -> Any:
        if self._config is None:
            self.load_model()
        return self._config
