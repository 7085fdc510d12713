"""This hospital's own version of a released model: fine-tuned here, or with layers of its own.

It stays in the site's folder, at own-models/KEY, in the form that a released model has. It may be
used wherever the released one may; `fedward-site predict` takes it unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from client.config import SiteFolder
from shared.errors import ConfigError
from shared.files import make_folder, replace_file
from shared.parameters import FlatVector
from shared.plan import StudyPlan
from shared.released import ReleasedModel, model_files, read_model

FOLDER = "own-models"


def own_folder(folder: SiteFolder, key: str) -> Path:
    """Where this site's version of the released model `key` lies, if it has one."""
    return folder.path / FOLDER / key


def write_own_model(
    folder: SiteFolder,
    key: str,
    plan: StudyPlan,
    parameters: FlatVector,
    facts: Mapping[str, object],
) -> Path:
    """Keep this site's version of a released model, in place of an older one; returns its folder.

    Args:
        folder: The site's.
        key: Of the released model.
        plan: That the own version came from.
        parameters: float32, shape (d,).
        facts: What else its model.json says.
    """
    where = own_folder(folder, key)
    make_folder(where)
    # The description comes last: a reader between the two refuses rather than mixes them.
    files = model_files(plan, parameters, {"of_model": key, **facts})
    (where / "model.json").unlink(missing_ok=True)
    for name in ("model.safetensors", "model.json"):
        replace_file(where / name, files[name])
    return where


def own_version(folder: SiteFolder, model: ReleasedModel) -> ReleasedModel | None:
    """This site's version of a released model; None where it has none.

    Raises:
        ConfigError: there is one, and it is damaged.
    """
    where = own_folder(folder, model.key)
    return read_model(where) if where.exists() else None


def usable(
    folder: SiteFolder, model: ReleasedModel, *, as_released: bool = False
) -> tuple[ReleasedModel, bool]:
    """The model that this site should ask, and whether it is its own version.

    Raises:
        ConfigError: some layers are each site's own, and this site has none: they are as they were
            before anybody trained.
    """
    own = None if as_released else own_version(folder, model)
    if own is None and model.plan.model.personal:
        raise ConfigError(
            f"the layers {', '.join(model.plan.model.personal)} of this model are each site's own, "
            "and the released file holds them untrained. "
            + (
                "Leave --as-released out."
                if as_released
                else "This site took no part in the study: train them with fedward-site finetune."
            )
        )
    return (model, False) if own is None else (own, True)
