"""`cramjax check`: is what this machine computes right, and how fast is it?"""

from collections.abc import Sequence

from cramjax.commands.common import Parser, print_value, require_directories, write_json


def check(words: Sequence[str]) -> int:
    """Check the machine; the exit code is 1 if a number is wrong."""
    parser = Parser(
        prog="cramjax check",
        description="Check a machine that is new: its devices, versions and memory; every kernel's implementations "
        "against float32, forward and backward, on every mask; its ceilings; and a small training step. Exit code 1 if "
        "a number is wrong. Run it while nothing else does: ceilings and times are those of the moment.",
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="Smaller shapes, and one precision: a minute or two.")
    parser.add_argument("--kernels", metavar="NAMES", help="Of kernels, check these alone: attention,dense.")
    parser.add_argument("--json", metavar="OUT", help="Also write everything to this file.")
    given = parser.parse_args(words)
    require_directories({"--json": given.json})
    import cramjax

    names = None if given.kernels is None else given.kernels.split(",")
    made = cramjax.check(quick=given.quick, kernels=names)
    print_value(made)
    if given.json is not None:
        write_json(given.json, made.json())
    return 1 if made.wrong else 0
