"""Any classification network of timm or torchvision by its name, with its pretrained weights."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cutmix_exp.data.sources import unreachable
from cutmix_exp.errors import UserError
from cutmix_exp.models.base import Model, Statistics
from cutmix_exp.schema import option

PROBE_CLASSES = 7


@dataclass(frozen=True)
class Published:
    """Weights that a library publishes.

    Attributes:
        url: of their file.
        server: address that answers without delay where they can be downloaded.
        cache: folder where the library keeps what it has downloaded.
        file: their file in it, if they were downloaded before.
    """

    url: str
    server: str
    cache: Path
    file: Path | None


@dataclass(frozen=True, kw_only=True)
class LibraryModel(Model):
    """A network that a library makes by name, with a head for the data set's classes.

    Attributes:
        architecture: the library's name of the network. With `pretrained` the tag of the weights
            may follow (`resnet50.IMAGENET1K_V1`); without one they are the library's choice.
        pretrained: start from published weights. Their head is kept where it has as many classes
            as the data set, else it is new; images are normalised as they were for them.
        weights: a file (.pth, .pt or .safetensors) that takes the place of the download.
        weights_sha256: of that file; filled in, so that the run's identity has its content. Without
            `weights`, of a file that need not be at hand, as of a finished run.
        options: numbers for the network's constructor, such as `drop_path_rate`; switches are 0
            and 1.
        image_size: filled in; for networks that are made for one side of the images.
    """

    library: ClassVar[str]

    architecture: str
    pretrained: bool = False
    weights: str | None = option(None, identity=False)
    weights_sha256: str | None = None
    options: dict[str, float] | None = None
    image_size: int | None = None

    # What the libraries answer, each in its way.

    def architectures(self) -> list[str]:
        """All names."""
        raise NotImplementedError

    def tags(self, architecture: str) -> list[str]:
        """Of an architecture's published weights, the library's choice first."""
        raise NotImplementedError

    def published(self) -> Published:
        raise NotImplementedError

    def make(self, num_classes: int) -> nn.Module:
        """The network with random weights."""
        raise NotImplementedError

    def load(self, num_classes: int, file: Path | None) -> nn.Module:
        """The network with weights from a file, or else from the library's server."""
        raise NotImplementedError

    # What they share.

    def resolve(self, image_size: int) -> LibraryModel:
        """Raises UserError: an unknown name, tag or option, a missing file, a network that cannot
        take such images or does not return logits."""
        resolved = replace(
            self,
            architecture=self._full_architecture(),
            weights_sha256=self._digest(),
            options={name: float(value) for name, value in sorted((self.options or {}).items())},
            image_size=image_size,
        )
        if self.name == self.library:
            resolved = replace(resolved, name=f"{self.library}.{resolved.architecture}")
        resolved._try_image()
        return resolved

    def prepare(self) -> None:
        """Make sure that pretrained weights are at hand or can be downloaded.

        Raises:
            UserError: they are not; says where they were looked for.
        """
        if not self.pretrained or self.weights:
            return
        if self.weights_sha256:
            raise UserError(
                f"model.weights_sha256={self.weights_sha256} is of a file of weights that is not "
                "named; add model.weights=FILE"
            )
        published = self.published()
        if published.file is None and (reason := unreachable(published.server)):
            raise UserError(
                f"the weights of {self.name} are not at hand\n"
                f"looked in: {published.cache}\n"
                f"download:  {published.url} failed: {reason}\n"
                "to mend:   bring this file from elsewhere and add model.weights=FILE, or start from "
                "random weights by model.pretrained=false"
            )

    def build(self, num_classes: int) -> nn.Module:
        """Raises UserError: the pretrained weights cannot be had, or do not fit the network."""
        if not self.pretrained:
            return self.make(num_classes)
        self.prepare()
        file = Path(self.weights) if self.weights else self.published().file
        try:
            return self.load(num_classes, file)
        except Exception as error:  # whatever the library raises: the file is what is wrong
            raise UserError(
                f"the weights of {self.name} from {file or self.published().url} cannot be used: "
                f"{str(error) or type(error).__name__}\n"
                "name another file by model.weights=FILE, or start from random weights by "
                "model.pretrained=false"
            ) from None

    def blank(self, num_classes: int) -> nn.Module:
        return self.make(num_classes)

    def arguments(self) -> dict[str, Any]:
        """The options as the constructor takes them: whole numbers are integers."""
        given = (self.options or {}).items()
        return {name: int(value) if value.is_integer() else value for name, value in given}

    def _full_architecture(self) -> str:
        """With the tag of the weights where there are any, without one elsewhere."""
        plain, _, tag = self.architecture.partition(".")
        names = self.architectures()
        if plain not in names:
            close = difflib.get_close_matches(plain, names, n=5)
            raise UserError(
                f"model.architecture={self.architecture}: {self.library} has no such network"
                + (f"; the nearest are {', '.join(close)}" if close else "")
                + f"\n{self.library}'s list_models() shows all {len(names)}"
            )
        if not self.pretrained:
            if tag or self.weights:
                what = f"weights={self.weights}" if self.weights else f"architecture={plain}.{tag}"
                raise UserError(
                    f"model.{what} names pretrained weights, but model.pretrained=false; "
                    "add model.pretrained=true, or leave it out"
                )
            return plain
        tags = self.tags(plain)
        if tag and tag not in tags:
            raise UserError(
                f"model.architecture={self.architecture}: {self.library} has no such weights; "
                f"tags of {plain}: {', '.join(tags) or 'none'}"
            )
        if not tags and not self.weights and not self.weights_sha256:
            raise UserError(
                f"model.pretrained=true: {self.library} publishes no weights of {plain}; "
                "name a file by model.weights=FILE, or leave model.pretrained out"
            )
        return f"{plain}.{tag or tags[0]}" if tags else plain

    def _digest(self) -> str | None:
        if self.weights is None:
            return self.weights_sha256
        found = sha256(Path(self.weights))
        if self.weights_sha256 not in (None, found):
            raise UserError(
                f"model.weights={self.weights} is another file than before: its SHA-256 is {found}, "
                f"model.weights_sha256={self.weights_sha256}"
            )
        return found

    def _try_image(self) -> None:
        """Make the network and show it an image, on the meta device: shapes, no arithmetic."""
        side = self.image_size
        assert side is not None
        try:
            network = self._sketch()
        except Exception as error:
            raise UserError(self._refusal(error)) from None
        try:
            logits = network(torch.zeros(1, 3, side, side, device="meta"))
        except Exception as error:
            raise UserError(
                f"{self.name} cannot take images of {side} px: {first_line(error)}\n"
                "choose another model.architecture, or other images (dataset.image_size)"
            ) from None
        if not isinstance(logits, Tensor) or logits.shape != (1, PROBE_CLASSES):
            raise UserError(f"{self.name} returns no logits for the classes; it is no classifier")

    def _sketch(self) -> nn.Module:
        """The network without numbers, in evaluation mode."""
        try:
            with torch.device("meta"):
                return self.make(PROBE_CLASSES).eval()
        except NotImplementedError:  # its constructor computes with tensors, as RegNet's does
            return self.make(PROBE_CLASSES).to("meta").eval()

    def _refusal(self, error: Exception) -> str:
        """Why the constructor refused: an option that it does not have, a size, ..."""
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and self.options and unknown[1] in self.options:
            parameters = inspect.signature(type(replace(self, options=None)._sketch())).parameters
            numbers = [n for n, p in parameters.items() if isinstance(p.default, (int, float))]
            allowed = sorted({*numbers} - {"num_classes", "in_chans", "img_size"})
            close = difflib.get_close_matches(unknown[1], allowed, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            return (
                f"model.options: {self.name} has no option '{unknown[1]}'{hint}\n"
                f"numbers that its constructor takes: {', '.join(allowed) or '(none)'}"
            )
        given = f" with model.options={self.options}" if self.options else ""
        return (
            f"{self.name} cannot be made for images of {self.image_size} px{given}: "
            f"{first_line(error)}\n"
            "choose another model.architecture, other model.options or other images "
            "(dataset.image_size)"
        )


@dataclass(frozen=True, kw_only=True)
class TimmModel(LibraryModel):
    """A network of timm (huggingface/pytorch-image-models)."""

    library: ClassVar[str] = "timm"

    def architectures(self) -> list[str]:
        import timm

        return timm.list_models()

    def tags(self, architecture: str) -> list[str]:
        import timm

        chosen = timm.get_pretrained_cfg(architecture)
        names = timm.list_pretrained(f"{architecture}.*")
        tags = [name.partition(".")[2] for name in names]
        return sorted(tags, key=lambda tag: (tag != getattr(chosen, "tag", None), tag))

    def published(self) -> Published:
        import huggingface_hub as hub
        import timm

        cfg = timm.get_pretrained_cfg(self.architecture)
        assert cfg is not None
        if not cfg.hf_hub_id:
            return in_torch_hub(str(cfg.url))
        name = cfg.hf_hub_filename or "model.safetensors"
        found = hub.try_to_load_from_cache(cfg.hf_hub_id, name)
        return Published(
            url=hub.hf_hub_url(cfg.hf_hub_id, name),
            server=hub.constants.ENDPOINT,
            cache=Path(hub.constants.HF_HUB_CACHE),
            file=Path(found) if isinstance(found, str) else None,
        )

    def normalization(self) -> Statistics | None:
        import timm

        cfg = timm.get_pretrained_cfg(self.architecture) if self.pretrained else None
        return None if cfg is None else (tuple(cfg.mean), tuple(cfg.std))

    def make(self, num_classes: int) -> nn.Module:
        import timm

        network = timm.create_model(self.architecture, num_classes=num_classes, **self._arguments())
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        if patch and self.image_size and any(self.image_size % side for side in patch):
            raise ValueError(f"its patches of {patch[0]}x{patch[1]} px would leave out a border")
        return network

    def load(self, num_classes: int, file: Path | None) -> nn.Module:
        import timm

        # With the weights' own number of classes timm demands every tensor; with another it
        # would leave out without a word what the file lacks.
        network: Any = timm.create_model(
            self.architecture,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(file), "custom_load": False} if file else None,
            **self._arguments(),
        )
        if network.num_classes != num_classes:
            network.reset_classifier(num_classes)
        return network

    def _arguments(self) -> dict[str, Any]:
        """The options, and the image's side for a network that is made for one."""
        import timm

        cfg = timm.get_pretrained_cfg(self.architecture)
        sized = {"img_size": self.image_size} if cfg is not None and cfg.fixed_input_size else {}
        return {**sized, **self.arguments()}


@dataclass(frozen=True, kw_only=True)
class TorchvisionModel(LibraryModel):
    """A classification network of torchvision. GoogLeNet and Inception v3 come without their
    auxiliary heads."""

    library: ClassVar[str] = "torchvision"

    def architectures(self) -> list[str]:
        from torchvision import models

        return models.list_models(module=models)

    def tags(self, architecture: str) -> list[str]:
        from torchvision import models

        known = models.get_model_weights(architecture)
        tags = [weights.name for weights in known]
        return sorted(tags, key=lambda tag: (known[tag] is not known.DEFAULT, tag))

    def published(self) -> Published:
        return in_torch_hub(self._weights().url)

    def normalization(self) -> Statistics | None:
        if not self.pretrained:
            return None
        transforms = self._weights().transforms()
        return tuple(transforms.mean), tuple(transforms.std)

    def make(self, num_classes: int) -> nn.Module:
        from torchvision import models

        name, side = self.architecture.partition(".")[0], self.image_size
        sized: dict[str, Any] = {}
        if name.startswith("vit_"):
            sized = {"image_size": side}
        elif name.startswith("maxvit_"):
            sized = {"input_size": (side, side)}
        elif name in ("googlenet", "inception_v3"):
            # Their weights were trained on another normalisation, which this flag restores.
            sized = {
                "aux_logits": False,
                "init_weights": not self.pretrained,
                "transform_input": self.pretrained,
            }
        return models.get_model(
            name, weights=None, num_classes=num_classes, **sized | self.arguments()
        )

    def load(self, num_classes: int, file: Path | None) -> nn.Module:
        if file is None:
            state = self._weights().get_state_dict(progress=False, check_hash=True)
        else:
            state = read_state(file)
        auxiliary = ("AuxLogits.", "aux1.", "aux2.")
        state = {
            # DenseNet's files have names of an older version: norm.1 for norm1.
            re.sub(r"\.(norm|relu|conv)\.([12])\.", r".\1\2.", key): value
            for key, value in state.items()
            if not key.startswith(auxiliary)
        }
        network = self.make(num_classes)
        own = network.state_dict()
        differing = [k for k in own if k in state and own[k].shape != state[k].shape]
        *_, last = (key for key in own if key.endswith(".weight"))
        head = last.removesuffix("weight")
        if all(key.startswith(head) for key in differing):  # another number of classes
            state.update({key: own[key] for key in differing})
        network.load_state_dict(state)
        return network

    def _weights(self) -> Any:
        from torchvision import models

        name, _, tag = self.architecture.partition(".")
        return models.get_model_weights(name)[tag]


def in_torch_hub(url: str) -> Published:
    """Weights that torch.hub downloads into its folder."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(url).name
    return Published(url, url, folder, file if file.exists() else None)


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a checkpoint, which may hold them under `model` or
    `state_dict`. Nothing in it is executed."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    return dict(state)


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal digits. Raises UserError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(
            f"model.weights={file} cannot be read: {error.strerror}; name a file of weights"
        ) from None
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
