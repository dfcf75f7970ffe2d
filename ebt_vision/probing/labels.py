"""Labels of a training and a validation set: checks, alignment, and the seeded split for choices."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ebt_vision.data.sources import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Classes 0..num_classes-1 of both sets."""

    train: np.ndarray  # int64 (num_train,)
    val: np.ndarray  # int64 (num_val,)
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """The classes of the training set; the validation set may have fewer."""
        return len(self.class_names)


def align_labels(
    train: Sequence[int] | None, train_names: Sequence[str] | None, val: Sequence[int] | None, val_names: Sequence[str] | None
) -> Labels:
    """Number the classes of both sets in the same way: by name if both have names, by number if neither has names.

    Raises DataError without labels, with fewer than 2 classes, and for a validation class that the training set does not have.
    """
    for split, labels in (("training", train), ("validation", val)):
        if labels is None:
            raise DataError(f"the {split} set has no labels; use class folders or --label-column")
        if min(labels) < 0:
            raise DataError(f"the {split} set has images without a label ({min(labels)}); remove them")
    assert train is not None and val is not None
    if (train_names is None) != (val_names is None):
        named, numbered = ("training", "validation") if val_names is None else ("validation", "training")
        raise DataError(f"labels differ between the splits: the {named} set has class names, the {numbered} set numbers")
    of_train, of_val = _called(train, train_names), _called(val, val_names)
    known = sorted(set(of_train), key=lambda name: (len(name), name) if train_names is None else (0, name))
    if len(known) < 2:
        raise DataError(f"the training set has {len(known)} class ({known[0]}); a probe needs at least 2")
    strange = sorted(set(of_val) - set(known))
    if strange:
        shown = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
        raise DataError(f"labels differ between the splits: the training set lacks {len(strange)} validation classes ({shown})")
    number = {name: place for place, name in enumerate(known)}
    return Labels(
        train=np.array([number[name] for name in of_train]),
        val=np.array([number[name] for name in of_val]),
        class_names=tuple(known),
    )


def stratified_split(
    labels: np.ndarray, usable: np.ndarray, share: float, seed: int, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices to fit on, held-out indices), sorted, of the images that are `usable`, bool (N,).

    About `share` of each class is held out, at least one image and never all.

    Raises DataError for a class with fewer than two usable images.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"held-out share {share:g} is not between 0 and 1; use 0.1")
    random = np.random.default_rng(np.random.SeedSequence((seed, 0x73706C74)))
    held = []
    for number, name in enumerate(class_names):
        members = np.flatnonzero((labels == number) & usable)
        if len(members) < 2:
            found = f"{len(members)} readable training image{'s' * (len(members) != 1)}"
            raise DataError(
                f"class {name!r} has {found}; choices are made on held-out images, so every class needs at least 2: "
                "add images, raise the limits, or remove the class"
            )
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held.append(random.permutation(members)[:count])
    held_out = np.sort(np.concatenate(held))
    fit = np.setdiff1d(np.flatnonzero(usable), held_out)
    return fit, held_out


def _called(labels: Sequence[int], names: Sequence[str] | None) -> list[str]:
    return [str(label) if names is None else names[label] for label in labels]
