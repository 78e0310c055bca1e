"""Loading: turns a model option into a tokenizer, a config and weights, from the hub, a folder or nothing at all.

The model that is sharded is made without memory ("meta") on every rank. checkpoints/pretrained.py fills it: from the
files, or from a model that transformers loads on rank 0, because transformers knows every checkpoint's conversions.
"""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import safe_open

from sftlab.assets import locate
from sftlab.common.hub import explain
from sftlab.common.values import Count, Positive
from sftlab.models.architecture import ATTENTIONS, DRAWN_EXPERTS, attention
from sftlab.models.foreign import refuse_foreign_parts

if TYPE_CHECKING:  # every Model is constructed to check a config, and these take seconds to import
    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from sftlab.models.vocabulary import NewRows

log = logging.getLogger(__name__)

DEMO = "asset://demo/model"
INITS = ("pretrained", "random")
NEW_ROWS = ("mean", "pieces")
NOISE = ("drop", "jitter_noise", "jitter_eps")  # parts of the names of what makes training random


@dataclass(frozen=True)
class Model:
    """One model option.

    `architecture` is the shape (a transformers config) that init=random builds without a network. The model
    fine-tunes well with `learning_rate`, an adapter of it with `adapter_learning_rate`: the defaults of `optim.lr`.
    `add_tokens` and `add_words` are tokens that the tokenizer gets. For them, or with a `vocabulary_multiple`, the
    model gets rows (models/vocabulary.py).
    """

    name_or_path: str
    learning_rate: Positive = 1e-5
    adapter_learning_rate: Positive = 2e-4
    tokenizer: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    attention: Literal["auto", "flex", "blocks", "sdpa", "eager"] = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    tokenizer_revision: str | None = None
    architecture: dict[str, Any] | None = None
    add_tokens: tuple[str, ...] | list[str] = ()
    add_words: tuple[str, ...] | list[str] = ()
    new_rows_from: Literal["mean", "pieces"] = "mean"
    vocabulary_multiple: Count | None = None

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"model.init={self.init}: expected {' or '.join(INITS)}")
        if self.attention not in ("auto", *ATTENTIONS):
            raise ValueError(f"model.attention={self.attention}: expected auto, {', '.join(ATTENTIONS)}")
        if self.new_rows_from not in NEW_ROWS:
            raise ValueError(f"model.new_rows_from={self.new_rows_from}: expected {' or '.join(NEW_ROWS)}")
        if self.vocabulary_multiple is not None and self.vocabulary_multiple < 1:
            raise ValueError(f"model.vocabulary_multiple={self.vocabulary_multiple}: expected at least 1")
        added = [*self.add_tokens, *self.add_words]
        if wrong := [t for t in added if not t.strip() or added.count(t) > 1]:
            raise ValueError(f"model.add_tokens, model.add_words: {wrong[0]!r} is blank, or there twice")

    def load_tokenizer(self) -> Any:
        """Return the tokenizer with the tokens that are added to it."""
        from sftlab.models.vocabulary import add_to

        tokenizer = self.own_tokenizer()
        add_to(tokenizer, self.add_tokens, self.add_words)
        return tokenizer

    def own_tokenizer(self) -> Any:
        """Return the tokenizer; without a network an untrained hub model uses the demo's tokenizer, with a warning."""
        from transformers import AutoTokenizer

        name = self.tokenizer or self.name_or_path
        refuse_foreign_parts(Path(locate(name)))
        try:
            own = self.tokenizer_revision or (self.revision if self.tokenizer is None else None)
            return AutoTokenizer.from_pretrained(locate(name), **self._hub() | {"revision": own})
        except Exception as error:
            if self.init == "random" and self.tokenizer is None and self.architecture is not None:
                log.warning(
                    "the tokenizer of %s cannot be loaded here; using the demo's (model.tokenizer= names another)", name
                )
                return AutoTokenizer.from_pretrained(locate(DEMO))
            if not self.tokenizer and self._adapter() is not None:
                raise self._explained(error) from error
            raise explain(
                error, name, "tokenizer", "model.tokenizer" if self.tokenizer else "model.name_or_path"
            ) from error

    def load_config(self, device: "torch.device") -> "PreTrainedConfig":
        """Return the config with the chosen attention, no noise (the loss would depend on layout), and all tokens."""
        config = self.own_config()
        if is_mxfp4(config):
            del config.quantization_config  # the weights are expanded, and exported so
        silence(config)
        config._attn_implementation = attention(config, device, self.attention)
        if new := self.new_rows():
            config.get_text_config().vocab_size = new.size
        return config

    def new_rows(self) -> "NewRows | None":
        """Return which rows the model needs besides those of its files; None if it keeps its vocabulary."""
        if not (self.add_tokens or self.add_words or self.vocabulary_multiple):
            return None
        from sftlab.models.vocabulary import new_rows

        multiple = self.vocabulary_multiple or 1
        return new_rows(self.own_config(), self.own_tokenizer(), self.load_tokenizer(), multiple, self.new_rows_from)

    def own_config(self) -> "PreTrainedConfig":
        """Return the config as it was published."""
        from transformers import AutoConfig

        import sftlab.models.blocks  # noqa: F401  makes its attention known to transformers

        if self.init == "random" and self.architecture is not None:
            config = AutoConfig.for_model(**self.architecture)
        else:
            refuse_foreign_parts(Path(locate(self.name_or_path)))
            try:
                config = AutoConfig.from_pretrained(locate(self.name_or_path), **self._hub())
            except Exception as error:
                raise self._explained(error) from error
        return config

    def weight_files(self, config: "PreTrainedConfig") -> dict[str, str]:
        """Return the safetensors file of every tensor by its name; nothing where transformers must do the loading.

        It must where there are no such files, where they are quantised, or where the model comes with code of its own.
        """
        from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

        if self.init == "random" or self.trust_remote_code or getattr(config, "quantization_config", None):
            return {}
        refuse_foreign_parts(Path(locate(self.name_or_path)))

        def find(name: str) -> str | None:
            found: str | None = cached_file(
                locate(self.name_or_path), name, revision=self.revision, _raise_exceptions_for_missing_entries=False
            )
            return found

        try:
            if index := find(SAFE_WEIGHTS_INDEX_NAME):
                wanted: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
                files = {file: find(file) or "" for file in set(wanted.values())}
                return {tensor: files[file] for tensor, file in wanted.items()} if all(files.values()) else {}
            if file := find(SAFE_WEIGHTS_NAME):
                with safe_open(file, framework="pt") as opened:
                    return dict.fromkeys(opened.keys(), file)
        except Exception as error:
            raise explain(error, self.name_or_path, "model", "model.name_or_path") from error
        return {}

    def generation_config(self, config: "PreTrainedConfig") -> "GenerationConfig":
        """Return the pretrained model's own generation config, or one made from its config where it has none."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(locate(self.name_or_path), revision=self.revision)
        except OSError:
            return GenerationConfig.from_model_config(config)

    def load_weights(
        self, config: "PreTrainedConfig", seed: int, device: "torch.device | str" = "cpu"
    ) -> "PreTrainedModel":
        """Return the whole model in float32: pretrained, on the host, or initialised from `seed` on `device`."""
        import torch
        from transformers import AutoModelForCausalLM

        refuse_foreign_parts(Path(locate(self.name_or_path)))
        if self.init == "random":
            device = torch.device(device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
                torch.manual_seed(seed)
                return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        config = copy.deepcopy(config)
        if is_mxfp4(published := self.own_config()):  # GPT-OSS: 4 bits cannot be trained
            config.quantization_config = {**published.quantization_config, "dequantize": True}
        if new := self.new_rows():
            config.get_text_config().vocab_size = new.held
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                locate(self.name_or_path),
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **self._hub(),
            )
        except Exception as error:
            raise self._explained(error) from error
        require_all(info, f"model.name_or_path={self.name_or_path}")
        loaded: PreTrainedModel = model
        head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        if config.get_text_config().tie_word_embeddings and head is not None and head.weight is not embedding.weight:
            raise other_head(f"model.name_or_path={self.name_or_path}", "the head", "the embedding")
        if new:
            from sftlab.models.vocabulary import grow

            return grow(loaded, new)
        return loaded

    def _adapter(self) -> str | None:
        """Return the base model that the adapter in this folder belongs to; None if there is no adapter."""
        file = Path(locate(self.name_or_path)) / "adapter_config.json"
        if not file.is_file() or (file.parent / "config.json").is_file():
            return None
        return str(json.loads(file.read_text()).get("base_model_name_or_path"))

    def _explained(self, error: Exception) -> Exception:
        """Return the error to show for one met while the model was loaded."""
        here, text = f"model.name_or_path={self.name_or_path}", str(error)
        if (base := self._adapter()) is not None:
            return ValueError(
                f"{here}: this folder holds an adapter, not a model. Train its base, model.name_or_path={base}, or "
                "merge the adapter into the base first (python -m sftlab.export run=RUN merge=true; with peft alone "
                "merge_and_unload, then save_pretrained)"
            )
        if "does not recognize this architecture" in text:
            from transformers import __version__

            kind = text.partition("model type `")[2].partition("`")[0]
            return ValueError(
                f"{here}: transformers {__version__} does not know models of type {kind}. A newer one may "
                "(pip install --upgrade transformers), or the model has code of its own (model.trust_remote_code=true)"
            )
        if "no file named" in text:
            return FileNotFoundError(
                f"{here}: this folder has a config and no weights (model.safetensors). Copy them there, or train from "
                "random weights with model.init=random"
            )
        return explain(error, self.name_or_path, "model", "model.name_or_path")

    def _hub(self) -> dict[str, Any]:
        if self.trust_remote_code:
            log.warning("model.trust_remote_code=true: code from %s will run on this machine", self.name_or_path)
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision}


def is_mxfp4(config: "PreTrainedConfig") -> bool:
    """Return whether a model was published with experts of 4 bits, as GPT-OSS is."""
    found = getattr(config, "quantization_config", None)
    return isinstance(found, dict) and found.get("quant_method") == "mxfp4"


def other_head(where: str, head: str, embedding: str) -> ValueError:
    """Return the error for weights whose head is not the embedding, though their config says so."""
    return ValueError(
        f"{where}: config.json says that the head is the embedding (tie_word_embeddings), and the weights have a head "
        f"of their own: {head} differs from {embedding}. Training would throw it away. If the model was trained with "
        'it, write "tie_word_embeddings": false in config.json'
    )


def require_all(info: Any, name: str) -> None:
    """Raise ValueError if a checkpoint lacks weights, or has them in another shape: they would be random."""
    wrong = [f"{key} is {tuple(has)} and should be {tuple(wants)}" for key, has, wants in info["mismatched_keys"]]
    wrong += [f"{key} is missing" for key in sorted(info["missing_keys"])]
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} weights are not those that its config.json describes, such as {wrong[0]}. Use the "
            "config.json that the weights were saved with"
        )


def silence(config: "PreTrainedConfig") -> None:
    """Set what makes a training step random to 0, in the parts of a config too."""
    for key, value in vars(config).items():
        if (
            isinstance(value, float)
            and key != DRAWN_EXPERTS.get(config.model_type)
            and any(noise in key for noise in NOISE)
        ):
            setattr(config, key, 0.0)
        elif hasattr(value, "model_type") and hasattr(value, "to_dict"):
            silence(value)


def skeleton(config: "PreTrainedConfig", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
    """Return the model in training mode. Its parameters are in `dtype` and have no memory; its buffers have values.

    Buffers that no file holds (rotary tables) come from the model's own constructor: recomputing them afterwards went
    wrong in AutoModel #2549.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with parameters_without_memory():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    for parameter in model.parameters():  # not buffers: rotary tables in bfloat16 are wrong from position 256 on
        parameter.data = parameter.data.to(dtype or torch.float32)
    return model.train()


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Put every parameter that a module registers inside on the meta device."""
    from torch import nn

    register = nn.Module.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
