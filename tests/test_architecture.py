"""The laws of the house, read from the source with `ast`: who imports whom, how large files are, what is documented."""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = "palm_rlhf"
FLOORS = {
    "ops": 0,
    "model": 1,
    "policy": 2,
    "algorithms": 3,
    "training": 4,
    "data": 5,
    "evaluation": 6,
    "serving": 6,
    "feedback": 7,
    "planning": 7,
    "commands": 8,
    "cli": 8,
}
SERVING = (  # the rooms of serving, lowest first
    {"call_form", "deadline", "generation", "served_adapters", "structured", "token_text"},
    {"engine"},
    {"served_model"},
    {"protocol"},
    {"http"},
    {"access_options", "chat", "dialogue", "terminal"},
)
ROOM_OF_AN_EXTRA = "feedback"  # its tables and pages are declared at import, by packages of the extra of its name
MIGRATIONS = "feedback/store/migrations/versions"  # written once by Alembic, and never read from top to bottom
TOP = 8  # the package itself: its __init__.py holds the public names, so no lower floor may import it
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60  # a sitting, and a screen beside the docstring, which --help may show
MAX_FILES = 25  # of a folder
NAMES_OF_ROOMS = {"__init__", "checkpoint", "config", "prompts"}  # which several rooms have, each its own
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORT_NAMES = {
    "argon2_cffi": "argon2",
    "beautifulsoup4": "bs4",
    "lingua_language_detector": "lingua",
    "python_multipart": "multipart",
    "PyYAML": "yaml",
}


def requirements(setup: Path) -> tuple[set[str], set[str]]:
    """The names that setup.py requires (Triton apart, which may be missing), and those of its extras."""
    core, extras = set(), set()
    for node in ast.parse(setup.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign):
            continue
        entries = chain.from_iterable(part.elts for part in ast.walk(node.value) if isinstance(part, ast.List))
        texts = (entry.value for entry in entries if isinstance(entry, ast.Constant))
        names = {re.match(r"[\w-]+", text).group().replace("-", "_") for text in texts}
        names = {IMPORT_NAMES.get(name, name) for name in names}
        match node.targets[0]:
            case ast.Name(id="DEPENDENCIES"):
                core |= names - {"triton"}
            case ast.Name(id="EXTRAS") | ast.Subscript(value=ast.Name(id="EXTRAS")):
                extras |= names
    return core, extras


def modules(target: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that one node imports, relative ones resolved against the package of the importing file."""
    match target:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            parents = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            base = ".".join([*parents, module] if module else parents)
            # `from palm_rlhf import ops` names a floor; `from palm_rlhf import PaLM` names the package itself; its
            # version is a word that any floor may say
            found = [alias.name for alias in names if (base, alias.name) != (PACKAGE, "__version__")]
            yield from {f"{base}.{name}" if base == PACKAGE and name in FLOORS else base for name in found}
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            yield name


def candidates(node: ast.AST, package: str) -> Iterator[str]:
    """What one node may import, to be compared with the modules there are: of `from a import b`, both a and a.b."""
    for base in modules(node, package):
        yield base
        if isinstance(node, ast.ImportFrom):
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_for_checkers(node: ast.AST) -> bool:
    """Whether a node is `if TYPE_CHECKING`, whose imports never run."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for node in filter(lambda node: not is_for_checkers(node), ast.iter_child_nodes(tree)):
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.Lambda)):
            yield from outside_functions(node)


def module_name(path: Path, source: Path) -> str:
    return ".".join([PACKAGE, *path.relative_to(source).with_suffix("").parts])


def floor_of(module: str) -> tuple[str, int]:
    """The folder that a dotted module of the package lies in, and its floor."""
    _, folder, *_ = [*module.split("."), ""]
    return folder, FLOORS.get(folder, TOP)


def serving_level(module: str) -> int:
    """The level of a dotted module in `SERVING`; its package, which imports nothing, is the lowest."""
    room = module.removeprefix(f"{PACKAGE}.serving").lstrip(".").split(".")[0]
    return next((level for level, rooms in enumerate(SERVING) if room in rooms), -1)


def serving_violations(path: Path, tree: ast.AST, source: Path) -> Iterator[str]:
    """Imports of one file of serving that go up; a file that lies in no room of it."""
    module, prefix = module_name(path, source), f"{PACKAGE}.serving."
    if not module.startswith(prefix) or module == f"{prefix}__init__":
        return
    level = serving_level(module)
    if level < 0:
        yield f"{path.name} lies in no room of serving: add it to SERVING"
    for node in ast.walk(tree):
        for name in candidates(node, package=module.rpartition(".")[0]):
            if name.startswith(prefix) and serving_level(name) > level:
                yield f"{path.name}:{node.lineno} imports {name}, which lies above it in serving"


def circle(trees: dict[str, ast.AST]) -> list[str]:
    """Modules of the package that import each other, the first one again at the end; none where there is no circle.

    Imports inside functions count, those for a type checker alone do not.
    """

    def imported(module: str, node: ast.AST) -> Iterator[str]:
        if is_for_checkers(node):
            return
        parents = module.removesuffix(".__init__") if module.endswith(".__init__") else module.rpartition(".")[0]
        for name in candidates(node, package=parents):
            yield from {name, f"{name}.__init__"} & trees.keys()
        for child in ast.iter_child_nodes(node):
            yield from imported(module, child)

    graph = {module: set(imported(module, tree)) for module, tree in trees.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]  # graphlib lists who is imported first
    return []


def import_violations(path: Path, tree: ast.AST, source: Path, core: set[str], extras: set[str]) -> Iterator[str]:
    """Imports of one file that leave its floor, hide Triton in the wrong file, or need what may not be installed."""
    module = module_name(path, source)
    folder, floor = floor_of(module)
    at_import = set(map(id, outside_functions(tree)))
    for node in ast.walk(tree):
        for name in modules(node, package=module.rpartition(".")[0]):
            where, distribution = f"{path.name}:{node.lineno} imports {name}", name.split(".")[0]
            if distribution == PACKAGE:
                target, target_floor = floor_of(name)
                is_command = path.stem.endswith("_command")  # which is imported when it is called
                if target == ROOM_OF_AN_EXTRA != folder and id(node) in at_import and not is_command:
                    yield f"{where}: {target} needs an extra, and is imported inside the function that uses it"
                if target_floor > floor or (target_floor == floor and target != folder and floor < TOP):
                    yield f"{where}: floor {floor} ({folder}) may import its own folder and lower floors only"
                if folder == "algorithms" and target not in ("ops", "algorithms"):
                    yield f"{where}: algorithms are pure functions and import ops only"
            elif distribution == "triton":
                if not module.startswith(f"{PACKAGE}.ops.triton."):
                    yield f"{where}: Triton is imported in ops/triton only"
            elif distribution in sys.stdlib_module_names or distribution in core:
                pass
            elif distribution not in extras:
                yield f"{where}: it is neither required nor in an extra of setup.py"
            elif id(node) in at_import and folder != ROOM_OF_AN_EXTRA:
                yield f"{where}: an extra is imported inside the function that uses it"


def is_public(node: ast.AST) -> bool:
    return isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_")


def is_covered_by_its_class(method: ast.AST) -> bool:
    """Properties read as attributes, and forward and backward as calls of their class: its docstring covers them."""
    decorators = getattr(method, "decorator_list", [])
    return method.name in ("forward", "backward") or any(ast.unparse(d).endswith("property") for d in decorators)


def documentation_violations(path: Path, tree: ast.Module) -> Iterator[str]:
    """Public functions, classes and their methods of one file that have no docstring."""
    for node in filter(is_public, tree.body):
        members = filter(is_public, node.body if isinstance(node, ast.ClassDef) else [])
        for item in (node, *(member for member in members if not is_covered_by_its_class(member))):
            if not ast.get_docstring(item):
                yield f"{path.name}:{item.lineno} {item.name} has no docstring"


def size_violations(path: Path, text: str, tree: ast.AST) -> Iterator[str]:
    """A file that is not read in one sitting, or functions that do not fit a screen."""
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        yield f"{path.name} has {lines} lines, above {MAX_FILE_LINES}"
    for node in filter(lambda node: isinstance(node, FUNCTIONS), ast.walk(tree)):
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{path.name}:{node.lineno} {node.name} has {lines} lines, above {MAX_FUNCTION_LINES}"


def room_violations(source: Path) -> Iterator[str]:
    """Two files of one name, which a search for the name cannot tell apart, or a folder that cannot be overlooked."""
    paths = sorted(source.rglob("*.py"))
    for name, number in Counter(path.stem for path in paths).items():
        if number > 1 and name not in NAMES_OF_ROOMS:
            yield f"{number} files are called {name}.py: give each a name of its own"
    classes = Counter(
        node.name
        for path in paths
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    for name, number in classes.items():
        if number > 1 and not name.startswith("_"):
            yield f"{number} classes are called {name}: give each a name of its own"
    for folder, number in Counter(path.parent for path in paths if path.stem != "__init__").items():
        if number > MAX_FILES:
            yield f"{folder.name} holds {number} files, above {MAX_FILES}: make rooms in it"


def violations(root: Path) -> list[str]:
    """Every broken law of the project in `root`, one sentence each."""
    source = root / PACKAGE
    core, extras = requirements(root / "setup.py")
    found, trees = [*room_violations(source)], {}
    for path in sorted(source.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        trees[module_name(path, source)] = tree = ast.parse(text, filename=str(path))
        found += import_violations(path, tree, source, core, extras)
        found += serving_violations(path, tree, source)
        found += documentation_violations(path, tree)
        if not path.is_relative_to(source / MIGRATIONS):
            found += size_violations(path, text, tree)
        if floor_of(module_name(path, source))[0] not in (*FLOORS, "__init__"):
            found.append(f"{path.relative_to(root)} lies on no floor")
    if modules_in_circle := circle(trees):
        found.append(f"modules import each other: {' imports '.join(modules_in_circle)}")
    return found


def test_the_house_is_in_order(root):
    assert list((root / PACKAGE).rglob("*.py"))
    assert violations(root) == []


SETUP = 'DEPENDENCIES = ["torch>=2.6", "triton; platform_system == \'Linux\'"]\nEXTRAS = {"plot": ["matplotlib>=3"]}\n'
LAWFUL = {
    "__init__.py": "from palm_rlhf.model.palm import PaLM\n",
    "ops/rotary.py": "import math\nimport torch\nfrom .masked import mean\n",
    "ops/masked.py": "import importlib.util\n\ndef mean():\n    'Mean.'\n    importlib.util.find_spec('triton')\n",
    "ops/triton/attention.py": "import triton\n",
    "model/palm.py": "from ..ops import rotary\n\nclass PaLM:\n    'A model.'\n    def forward(self): ...\n",
    "model/cache.py": "class KVCache:\n    'A cache.'\n    @property\n    def device(self): ...\n",
    "algorithms/kl.py": "from palm_rlhf.ops.masked import mean\n",
    "training/plot.py": "def plot():\n    'Curves.'\n    import matplotlib.pyplot\n",
    "serving/chat.py": "from palm_rlhf import model\nfrom palm_rlhf.serving.http import app\n\ndef _private(): ...\n",
    "cli.py": "from palm_rlhf import PaLM\nfrom palm_rlhf.serving import chat\n",
    "feedback/pages.py": "import matplotlib\nfrom palm_rlhf.serving import chat\n",
    "commands/collect.py": "def collect():\n    'Collect.'\n    from palm_rlhf.feedback import pages\n",
    "serving/http/replies.py": "from palm_rlhf import __version__\nfrom palm_rlhf.serving.engine import Engine\n",
    "serving/engine/__init__.py": "from palm_rlhf.serving.engine.engine import Engine\n",
    "serving/engine/engine.py": "if TYPE_CHECKING:\n    import matplotlib, palm_rlhf.serving.engine\n",
}


def project(folder: Path, files: dict[str, str]) -> Path:
    (folder / "setup.py").write_text(SETUP)
    for name, text in files.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_lawful_project_has_no_violation(tmp_path):
    assert violations(project(tmp_path, LAWFUL)) == []


LONG_FUNCTION = "def long():\n    'Long.'\n" + "    x = 1\n" * MAX_FUNCTION_LINES


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("ops/rotary.py", "from palm_rlhf.model.palm import PaLM\n", "floor 0"),
        ("ops/rotary.py", "from ..model import palm\n", "floor 0"),
        ("ops/rotary.py", "from palm_rlhf import model\n", "floor 0"),
        ("ops/rotary.py", "from palm_rlhf import PaLM\n", "floor 0"),
        ("ops/rotary.py", "import palm_rlhf.model.palm\n", "floor 0"),
        ("ops/rotary.py", "def f():\n    'Late.'\n    from palm_rlhf.model import palm\n", "floor 0"),
        ("ops/rotary.py", "import importlib\nimportlib.import_module('palm_rlhf.model.palm')\n", "floor 0"),
        ("model/interop/cohere.py", "from ...policy import reward\n", "floor 1"),
        ("training/rlhf/trainer.py", "from palm_rlhf.data import text\n", "floor 4"),
        ("serving/chat.py", "from palm_rlhf.feedback import app\n", "own folder"),
        ("cli.py", "from palm_rlhf.feedback.store import schema\n", "inside the function that uses it"),
        ("feedback/pages.py", "import flask\n", "neither required nor in an extra"),
        ("serving/engine/batch.py", "from palm_rlhf.serving.http.app import x\n", "lies above it in serving"),
        (
            "serving/generation.py",
            "def f():\n    'Late.'\n    from ..serving import engine\n",
            "lies above it in serving",
        ),
        ("serving/replies.py", "", "in no room of serving"),
        ("ops/masked.py", "def mean():\n    'Late.'\n    from palm_rlhf.ops.rotary import turn\n", "import each other"),
        ("serving/engine/engine.py", "import palm_rlhf.serving.engine\n", "import each other"),
        ("algorithms/kl.py", "from palm_rlhf.model.palm import PaLM\n", "import ops only"),
        ("ops/attention.py", "def f():\n    'Late.'\n    import triton.language as tl\n", "in ops/triton only"),
        ("ops/attention.py", "try:\n    from triton import jit\nfinally:\n    pass\n", "in ops/triton only"),
        ("ops/attention.py", "import importlib\nimportlib.import_module('triton')\n", "in ops/triton only"),
        ("training/plot.py", "import matplotlib.pyplot as plt\n", "inside the function"),
        ("training/plot.py", "class Plot:\n    'A plot.'\n    from matplotlib import pyplot\n", "inside the function"),
        ("training/plot.py", "def plot():\n    'Late.'\n    import wandb\n", "neither required nor in an extra"),
        ("extra.py", "", "lies on no floor"),
        ("ops/rotary.py", "def rotate():\n    return 1\n", "rotate has no docstring"),
        ("ops/rotary.py", "class Rotary:\n    def __init__(self): ...\n", "Rotary has no docstring"),
        ("ops/rotary.py", "class Rotary:\n    'A.'\n    def rotate(self): ...\n", "rotate has no docstring"),
        ("ops/rotary.py", "class Rotary:\n    'A.'\n    @staticmethod\n    def turn(): ...\n", "turn has no docstring"),
        ("ops/rotary.py", "\n" * (MAX_FILE_LINES + 1), "above 300"),
        ("ops/rotary.py", LONG_FUNCTION, "above 60"),
        ("training/rotary.py", "import math\n", "2 files are called rotary.py"),
        ("training/plot.py", "class PaLM:\n    'A plot.'\n", "2 classes are called PaLM"),
    ],
)
def test_each_broken_law_is_reported(tmp_path, name, text, expected):
    found = violations(project(tmp_path, {**LAWFUL, name: text}))
    assert any(expected in violation for violation in found), found


def test_a_folder_that_cannot_be_overlooked_is_reported(tmp_path):
    many = {f"ops/many{number}.py": "import math\n" for number in range(MAX_FILES)}
    found = violations(project(tmp_path, {**LAWFUL, **many}))
    assert any("make rooms in it" in violation for violation in found), found


def test_a_docstring_does_not_make_a_function_long(tmp_path):
    docstring = "    '''Long.\n" + "\n" * MAX_FUNCTION_LINES + "    '''\n"
    text = f"def long():\n{docstring}" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert violations(project(tmp_path, {**LAWFUL, "ops/rotary.py": text})) == []
