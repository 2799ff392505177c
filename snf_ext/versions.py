"""State dictionaries with a version for each kind of module, and what is done with older ones."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


class Versioned(nn.Module):
    """A module whose ``state_dict`` says of which version it is, and that reads older ones.

    The version is torch's own: each module's ``_version``, in the ``_metadata`` that ``state_dict``
    carries. A subclass whose keys change raises it, and overrides :meth:`_migrate`. A state of a
    newer version is refused, with both versions; one that came without metadata (as a plain dict,
    or from safetensors), or of another class, which the metadata name too, is taken for any version
    up to the module's. Where an
    older one lacks keys all the same, a warning has both versions.

    >>> import torch
    >>> class Scale(Versioned):
    ...     _version = 2  # version 1 had the scale itself
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.log_scale = nn.Parameter(torch.zeros(()))
    ...     def _migrate(self, state, prefix, version):
    ...         if prefix + "scale" in state:
    ...             state[prefix + "log_scale"] = state.pop(prefix + "scale").log()
    >>> module = Scale()
    >>> module.load_state_dict({"scale": torch.tensor(1.0)}), module.log_scale.item()
    (<All keys matched successfully>, 0.0)
    """

    def _migrate(self, state: dict[str, Any], prefix: str, version: int | None) -> None:
        """Make the keys of ``state`` that begin with ``prefix`` those of this version, in place."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:  # None where a plain dict is filled
            metadata[prefix[:-1]]["class"] = type(self).__name__
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = local_metadata.get("class", type(self).__name__) == type(self).__name__
        version = local_metadata.get("version") if own else None
        where = f"{prefix[:-1] or 'the module'} ({type(self).__name__})"
        if version is not None and version > self._version:
            error_msgs.append(
                f"the state of {where} must be of version {self._version} at most; got version "
                f"{version}, of a newer snf_ext"
            )
            return
        self._migrate(state_dict, prefix, version)
        before = len(missing_keys)
        lists = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        lacking = missing_keys[before:]
        if lacking and version is not None and version < self._version:
            # No error of its own: whether keys may be missing is the caller's to say.
            warnings.warn(
                f"the state of {where} must have {', '.join(lacking)}, as of version "
                f"{self._version}; got version {version}",
                stacklevel=5,
            )
