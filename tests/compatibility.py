"""The table behind docs/compatibility.md: which test shows what of which row.

``python tests/compatibility.py`` writes the page's table anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bijections_table import BIJECTIONS
from elementwise_table import ELEMENTWISE
from models_table import VARIANTS
from ops_table import OPS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
START, END = "<!-- table: python tests/compatibility.py -->", "<!-- end of table -->"

COLUMNS = (
    *("compile", "export", "autocast", "func", "DDP", "FSDP2", "deepcopy", "state_dict"),
    *("double backward refused", "empty batch", "non-contiguous", "channels_last"),
)


@dataclass(frozen=True)
class Not:
    """Why a column does not apply."""

    reason: str


FUNCTION = Not("An operator is a function: it has no parameters to share, copy or save.")
VECTORS = Not("It takes vectors, which have no such layout; their strides are the column before.")
JACOBIAN = Not(
    "Its exact values take a Jacobian by `torch.func`, which torch does not export for a batch of "
    "any size."
)
STATELESS = dict.fromkeys(("DDP", "FSDP2", "deepcopy", "state_dict"), FUNCTION)

# For each kind of row and column the tests, any of which has the row's name among its parameters.
Cell = tuple[str, ...] | Not
KINDS: dict[str, dict[str, Cell]] = {
    "operator": {
        "compile": ("test_ops.py::test_compiles_as_one_graph",),
        "export": ("test_export.py::test_operator",),
        "autocast": ("test_ops.py::test_autocast_computes_in_float32",),
        "func": ("test_func.py::test_operator",),
        **STATELESS,
        "double backward refused": ("test_ops.py::test_double_backward_is_refused",),
        "empty batch": ("test_ops.py::test_empty_batch",),
        "non-contiguous": ("test_ops.py::test_non_contiguous",),
        "channels_last": ("test_ops.py::test_channels_last",),
    },
    "element-wise operator": {
        "compile": ("test_elementwise.py::test_opcheck",),
        "export": ("test_export.py::test_elementwise_operator",),
        "autocast": ("test_elementwise.py::test_autocast_computes_in_float32",),
        "func": ("test_func.py::test_elementwise_operator",),
        **STATELESS,
        "double backward refused": (
            "test_elementwise.py::test_double_backward_is_refused_with_the_way_out",
        ),
        "empty batch": ("test_elementwise.py::test_empty_batch",),
        "non-contiguous": ("test_elementwise.py::test_non_contiguous_and_channels_last",),
        "channels_last": ("test_elementwise.py::test_non_contiguous_and_channels_last",),
    },
    "bijection": {
        "compile": ("test_compile_models.py::test_bijection", "test_bijections.py::test_compiles"),
        "export": ("test_export.py::test_bijection",),
        "autocast": ("test_autocast.py::test_bijections",),
        "func": (
            "test_func.py::test_bijection",
            "test_func.py::test_noisy_bijection",
            "test_func.py::test_what_depends_on_the_batch_refuses_in_training",
        ),
        "DDP": ("test_parallel.py::test_ddp",),
        "FSDP2": ("test_parallel.py::test_fsdp2",),
        "deepcopy": ("test_state.py::test_copies_of_bijections",),
        "state_dict": ("test_state.py::test_states_without_versions",),
        "double backward refused": ("test_layouts.py::test_double_backward_of_bijections",),
        "empty batch": ("test_bijections.py::test_empty_batch",),
        "non-contiguous": ("test_layouts.py::test_non_contiguous_bijections",),
        "channels_last": ("test_layouts.py::test_channels_last_bijections",),
    },
    "model": {
        "compile": (
            "test_compile_models.py::test_one_graph_for_all_batches",
            "test_compile_models.py::test_one_differentiated_graph_for_all_batches",
        ),
        "export": ("test_export.py::test_model", "test_export.py::test_model_in_either_way"),
        "autocast": ("test_autocast.py::test_models",),
        "func": ("test_func.py::test_model",),
        "DDP": ("test_parallel.py::test_ddp",),
        "FSDP2": ("test_parallel.py::test_fsdp2",),
        "deepcopy": ("test_state.py::test_copies_of_used_models",),
        "state_dict": ("test_state.py::test_state_dict",),
        "double backward refused": ("test_layouts.py::test_double_backward_of_models",),
        "empty batch": ("test_layouts.py::test_empty_batch_of_models",),
        "non-contiguous": ("test_layouts.py::test_layouts_of_models",),
        "channels_last": ("test_layouts.py::test_layouts_of_models",),
    },
}


@dataclass(frozen=True)
class Row:
    """An operator, bijection or model, with the names that it has among tests' parameters."""

    kind: str
    name: str
    among: tuple[str, ...]

    def cell(self, column: str) -> Cell:
        if self.name == "snf_linear" and column == "channels_last":
            return VECTORS
        if self.name == "SelfNormBijection" and column == "export":
            return JACOBIAN
        return KINDS[self.kind][column]

    def shown_by(self, node: str) -> bool:
        """Whether a test with these parameters is about this row."""
        parameters = node.partition("[")[2].rstrip("]")
        return any(re.search(rf"(^|-){re.escape(n)}(-|$)", parameters) for n in self.among)


def _rows(kind: str, named: list[tuple[str, str]]) -> list[Row]:
    together: dict[str, list[str]] = {}
    for row, name in named:
        together.setdefault(row, []).append(name)
    return [Row(kind, row, tuple(names)) for row, names in together.items()]


ROWS = [
    *_rows("operator", [(case.op, case.name) for case in OPS]),
    *_rows("element-wise operator", [(case.op, case.name) for case in ELEMENTWISE]),
    *_rows("bijection", [(type(case.make()).__name__, case.name) for case in BIJECTIONS]),
    *_rows("model", [(name, name) for name in VARIANTS]),
]


def files() -> set[str]:
    """Of all tests that are named here."""
    cells = [cell for columns in KINDS.values() for cell in columns.values()]
    tests = [test for cell in cells if not isinstance(cell, Not) for test in cell]
    return {test.partition("::")[0] for test in tests}


def table() -> str:
    """The page's table, in Markdown, and what its cells rest on."""
    reasons: list[str] = []

    def mark(cell: Cell) -> str:
        if not isinstance(cell, Not):
            return "yes"
        if cell.reason not in reasons:
            reasons.append(cell.reason)
        return f"– ({reasons.index(cell.reason) + 1})"

    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in ROWS:
        cells = [mark(row.cell(column)) for column in COLUMNS]
        lines.append(f"| `{row.name}` | {' | '.join(cells)} |")
    lines += ["", *(f"({i + 1}) {reason}  " for i, reason in enumerate(reasons)), ""]
    for kind, columns in KINDS.items():
        lines += [f"What shows it for each {kind}, in `tests/`:", ""]
        lines += [
            f"- {column}: {', '.join(f'`{test}`' for test in cell)}"
            for column, cell in columns.items()
            if not isinstance(cell, Not)
        ]
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """The page with the table as it is now."""
    before, _, rest = PAGE.read_text().partition(START)
    return f"{before}{START}\n\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page())
