"""Denoisers of the deepinv library, with weights from a local file: nothing is downloaded."""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ebt_vision.core.checks import MissingExtraError
from ebt_vision.core.precision import Precision
from ebt_vision.interop.peer import PeerDenoiser, state_hash
from ebt_vision.models.checkpoint import file_hash
from ebt_vision.models.pretrained_model import CheckpointError

RANDOM = "random"
"""Used instead of a file: random weights of seed 0."""
ONLINE = ("Client", "DiffusersDenoiserWrapper")
"""Denoisers that need internet access."""
SIDE_MULTIPLE = 16
"""The sides of the input are padded to a multiple of this; the deepest U-shaped networks of deepinv halve it four times."""
_CHANNELS = ("in_channels", "out_channels", "img_channels", "channels", "in_nc", "in_chans")
_WRAPPED = ("state_dict", "params_ema", "params")


def load(text: str, *, device: str = "cpu", precision: Precision = "auto") -> PeerDenoiser:
    """Load "deepinv:NAME", "deepinv:NAME:FILE" or "deepinv:NAME(depth=5, nf=16):FILE", for RGB images.

    NAME is a class of deepinv.models, the brackets hold what its constructor takes. FILE is a .safetensors, or a file of
    torch.save that holds tensors alone; a network without one is refused, unless FILE is "random". Raises MissingExtraError
    without deepinv, CheckpointError, in one line, for what cannot be built or loaded.
    """
    deepinv = import_deepinv()
    name, options, file = _parse(text)
    network = _build(deepinv, name, options)
    has_weights = next(network.parameters(), None) is not None
    digest = None
    if has_weights and not file:
        raise CheckpointError(f"deepinv:{name} needs weights; name their file, deepinv:{name}:FILE, or deepinv:{name}:{RANDOM}")
    if file and not has_weights:
        raise CheckpointError(f"deepinv:{name} has no weights; leave {file} out")
    if file == RANDOM:
        digest = state_hash(network.state_dict())
    elif file:
        _load_weights(network, name, Path(file))
        digest = file_hash(Path(file))
    network.to(device)
    argument = _sigma_argument(network)

    def call(images: Tensor, sigma: Tensor | None) -> Tensor:
        return network(images) if argument is None else network(images, **{argument: sigma})

    return PeerDenoiser(
        network,
        call,
        name=f"deepinv:{name}",
        takes_sigma=argument is not None,
        patch_size=SIDE_MULTIPLE if has_weights else 1,
        weights_hash=digest,
        precision=precision,
    )


def import_deepinv() -> Any:
    """Return deepinv.models. Raises MissingExtraError if deepinv is not installed."""
    try:
        import deepinv.models
    except ImportError:
        raise MissingExtraError('deepinv is not installed; run: pip install "ebt_vision[deepinv]"') from None
    return deepinv.models


def _parse(text: str) -> tuple[str, dict[str, Any], str]:
    """Split "NAME(option=value):FILE" into (NAME, {option: value}, FILE); FILE may be empty."""
    found = re.fullmatch(r"(\w+)(\(.*?\))?(?::(.+))?", text)
    if not found:
        raise CheckpointError(f"deepinv:{text} is not of the form deepinv:NAME, deepinv:NAME:FILE or deepinv:NAME(nf=16):FILE")
    name, brackets, file = found.groups()
    try:
        call = ast.parse(f"f{brackets or '()'}", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise CheckpointError(f"deepinv:{text}: {brackets} must hold plain values by name, such as (depth=5, nf=16)") from None
    return name, options, file or ""


def _build(models: Any, name: str, options: dict[str, Any]) -> nn.Module:
    build: Callable[..., nn.Module] | None = getattr(models, name, None)
    usable = callable(build) and (not inspect.isclass(build) or issubclass(build, models.Denoiser))
    if build is None or not usable or name in ONLINE:
        raise CheckpointError(
            f"deepinv has no denoiser {name!r} that works without the network; try DRUNet, DnCNN or TVDenoiser"
        )
    known = inspect.signature(build).parameters
    own: dict[str, Any] = {option: 3 for option in _CHANNELS if option in known and isinstance(known[option].default, int)}
    if "pretrained" in known:
        own["pretrained"] = None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build(**(own | options | {key: own[key] for key in ("pretrained",) if key in own}))
    except Exception as error:  # whatever a constructor makes of its options, packages that it lacks among them
        raise CheckpointError(f"deepinv:{name} cannot be built ({' '.join(str(error).split())})") from error
    if not isinstance(network, models.Denoiser):
        raise CheckpointError(f"deepinv:{name} is not a denoiser; try DRUNet, DnCNN or TVDenoiser")
    return network


def _load_weights(network: nn.Module, name: str, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"deepinv:{name}: {path} is not there; name a file of weights that you have")
    try:
        if path.suffix.lower() == ".safetensors":
            state: dict[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = next((state[key] for key in _WRAPPED if isinstance(state.get(key), dict)), state)
        network.load_state_dict(state)
    except (SafetensorError, RuntimeError, ValueError, OSError, AttributeError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())
    except Exception as error:  # torch's restricted unpickler raises pickle's errors
        reason = f"no file of plain tensors: {type(error).__name__}"
    else:
        return
    raise CheckpointError(f"deepinv:{name}: {path} does not fit ({reason[:300]})")


def _sigma_argument(network: nn.Module) -> str | None:
    """Return the name of the argument of `forward` for the noise level; None if there is none or it is not used.

    deepinv gives `sigma` the default None in networks that ignore it, RAM aside, which takes the physics before it.
    """
    known = inspect.signature(network.forward).parameters
    if "ths" in known:
        return "ths"
    return "sigma" if "sigma" in known and (known["sigma"].default is inspect.Parameter.empty or "physics" in known) else None
