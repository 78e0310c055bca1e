"""Adapters: small trained matrices beside the frozen weights of a model (LoRA and its kin), made by the peft library.

The layers and their arithmetic are peft's. They are put into the model in place, so that everything else sees the same
model as without them. What is ours is which layers are chosen, what the base calls each parameter, and that a first
adapter is a function of seed and name alone: peft draws on whatever rank and device a layer is made.
Source: LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, DoRA
https://arxiv.org/abs/2402.09353, QLoRA https://arxiv.org/abs/2305.14314.
"""

import hashlib
import importlib.util
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sftlab.common.values import Count, Positive

if TYPE_CHECKING:  # every config is checked against these constructors; torch, transformers and peft take seconds
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# peft imports it where it is installed, and on a CPU it warns of a kernel for inference that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

ADAPTER_CONFIG = "adapter_config.json"  # a folder with it holds an adapter, unless it has a config.json too
ALL_LINEAR = "all-linear"
QUANTIZE = ("none", "nf4")
INSIDE = ".modules_to_save.default."  # of the names of parameters that peft copies to train them


@dataclass(frozen=True)
class NoAdapter:
    """Train every weight. `learning_rate` is the default of `optim.lr`."""

    learning_rate: Positive = 1e-5

    def adapt(self, model: "PreTrainedModel", base: str, revision: str | None, dtype: "torch.dtype") -> None:
        """Leave the model as it is."""


@dataclass(frozen=True)
class Adapter:
    """Train an adapter of `rank` beside `targets`, and `modules_to_save` whole; everything else is frozen.

    `learning_rate` is the default of `optim.lr`.
    Raises: ValueError for a value that cannot be, and where peft or bitsandbytes is not installed.
    """

    learning_rate: Positive = 2e-4
    rank: Count = 16
    alpha: Count = 32
    dropout: float = 0.0
    targets: str | Sequence[str] = ALL_LINEAR
    modules_to_save: Sequence[str] = ()
    rslora: bool = False
    dora: bool = False
    quantize: Literal["none", "nf4"] = "none"

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"peft.rank={self.rank}: expected a whole number of at least 1, such as 16")
        if type(self.alpha) is not int or self.alpha < 1:
            raise ValueError(f"peft.alpha={self.alpha}: expected a whole number of at least 1, such as {2 * self.rank}")
        if self.dropout != 0:
            raise ValueError(
                f"peft.dropout={self.dropout}: only 0 is possible. Dropout would make the loss depend on how examples "
                "are laid out in rows and on the number of ranks. Use a smaller peft.rank or optim.weight_decay instead"
            )
        if self.quantize not in QUANTIZE:
            raise ValueError(f"peft.quantize={self.quantize}: expected {' or '.join(QUANTIZE)}")
        if not self.targets:
            raise ValueError(f"peft.targets={self.targets}: name at least one layer, or use peft.targets={ALL_LINEAR}")
        require("peft", "peft=none trains every weight")
        if self.quantize == "nf4":
            require("bitsandbytes", "peft=lora keeps the base unquantised")

    def adapt(self, model: "PreTrainedModel", base: str, revision: str | None, dtype: "torch.dtype") -> None:
        """Freeze a model that has no memory yet, and put the adapter into it. Frozen weights get `dtype`.

        `base` and `revision` are where anybody who loads the adapter finds the model. A frozen weight needs no more
        precision than the forward computes in, since nothing is ever added to it.
        Raises: ValueError if a target or a module to save is not there (lists what there is), or the base is quantised.
        """
        from peft import LoraConfig

        if getattr(model.config, "quantization_config", None):
            raise ValueError(
                f"model.name_or_path={base} is stored quantised, its head perhaps too: adapters on that are not "
                "possible. Name the model it was made from; peft=qlora quantises as it reads, all but the head"
            )
        targets = self.targets if self.targets == ALL_LINEAR else chosen("peft.targets", self.targets, model, is_layer)
        saved = chosen("peft.modules_to_save", self.modules_to_save, model, has_parameters)
        if both := sorted(set(saved) & set(targets)):
            raise ValueError(
                f"{both[0]} is in peft.targets and in peft.modules_to_save: an adapter lies beside frozen weights. "
                "Name it in one of them"
            )
        if self.quantize == "nf4":
            from sftlab.models.nf4 import quantize

            quantize(model)
        settings = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=targets,
            modules_to_save=saved or None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            revision=revision,
        )
        inject(settings, model)
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        model.peft_config = {"default": settings}


def inject(settings: Any, model: "PreTrainedModel") -> None:
    """Put the adapter that a peft config describes into a model, without memory, and freeze everything else."""
    from peft import inject_adapter_in_model

    with quiet_peft():
        inject_adapter_in_model(settings, model, low_cpu_mem_usage=True)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Drop peft's warnings of what is taken care of here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # merging gives the head its own weights
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # and it is set right then
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def require(package: str, instead: str) -> None:
    """Raise ValueError if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"peft: this adapter needs {package} (pip install {package}); {instead}")


def is_layer(module: "nn.Module") -> bool:
    """Return whether an adapter can lie beside a module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def has_parameters(module: "nn.Module") -> bool:
    """Return whether a module has parameters of its own."""
    return next(module.parameters(recurse=False), None) is not None


def chosen(key: str, asked: str | Sequence[str], model: "nn.Module", fits: "Callable[[nn.Module], bool]") -> list[str]:
    """Return the full names of the modules that `asked` names: a name, the end of one, or a pattern for all of it.

    Raises: ValueError for a word that no module fits, with the names that there are.
    """
    names = [name for name, module in model.named_modules() if name and fits(module)]
    found: dict[str, None] = {}
    for word in [asked] if isinstance(asked, str) else asked:
        try:
            pattern = re.compile(rf"(?:.*\.)?(?:{re.escape(word)}|{word})")
        except re.error as error:
            raise ValueError(f"{key}={word} is no name and no pattern ({error})") from None
        matching = [name for name in names if pattern.fullmatch(name)]
        if not matching:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ValueError(f"{key}={word}: no such layer in {type(model).__name__}. There are: {there}")
        found |= dict.fromkeys(matching)
    return list(found)


def base_name(name: str) -> str | None:
    """Return what the base model calls a parameter; None for one that only the adapter has."""
    if ".lora_" in name:
        return None
    return name.replace(".base_layer.", ".").replace(".original_module.", ".").replace(INSIDE, ".")


def peft_name(name: str) -> str:
    """Return what peft's files call a trained parameter of a model."""
    plain = name.replace(INSIDE, ".").replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
    return "base_model.model." + plain.replace(".default.", ".").removesuffix(".default")


def has_adapter(model: "nn.Module") -> bool:
    """Return whether a model in training has an adapter. AFMoE, for one, freezes biases of its own."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def first_values(name: str, shape: "torch.Size", seed: int) -> "Tensor":
    """Return what an adapter's matrix begins with, in peft's distributions: a function of seed and name alone."""
    import torch
    from torch import nn

    made = torch.zeros(shape)
    number = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest())
    draw = torch.Generator().manual_seed(number)
    if ".lora_A." in name:
        nn.init.kaiming_uniform_(made, a=math.sqrt(5), generator=draw)
    elif ".lora_embedding_B." in name:
        nn.init.normal_(made, generator=draw)
    return made


def magnitudes(model: "nn.Module") -> "Iterator[tuple[nn.Parameter, nn.Module, int]]":
    """Yield DoRA's magnitudes, each with the frozen layer whose weights it measures and along which dimension."""
    from torch import nn

    for module in model.modules():
        vectors = getattr(module, "lora_magnitude_vector", None)
        for vector in vectors.values() if isinstance(vectors, nn.ModuleDict) else ():
            layer: Any = module.get_base_layer()  # type: ignore[operator]
            yield vector.weight, layer, 0 if vector.fan_in_fan_out else 1  # type: ignore[misc]
