"""python -m hf_ext.run SCRIPT [ARGS...], or -m MODULE [ARGS...]: run a script with hf_ext registered.

The script sees what it would see if Python itself had started it: its own argv, its folder first on the path, its
namespace as `__main__`, its exit status and tracebacks. For environments in which PyTorch's autoload is off:

    python -m hf_ext.run train.py --attn_implementation anchor
    accelerate launch -m hf_ext.run train.py --attn_implementation anchor
    torchrun --nproc-per-node 2 -m hf_ext.run train.py --attn_implementation anchor
"""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from types import CodeType, ModuleType, TracebackType

from hf_ext import _autoload


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "-m" and len(arguments) == 1:
        sys.exit("hf_ext.run: -m needs a module name")
    _autoload.arm("run")
    _prepare_children()
    if arguments[0] == "-m":
        code, module, sys.argv[:] = _load_module(arguments[1:])
    else:
        code, module, sys.argv[:] = _load_script(arguments)
        if not sys.flags.safe_path:  # python -P and -I keep the script's folder off the path
            sys.path[0] = os.path.dirname(os.path.realpath(module.__file__))
    _execute(code, module)


def _prepare_children() -> None:
    """multiprocessing's spawn children start the script again, without us: they need autoload."""
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
        os.environ["HF_EXT_AUTOLOAD"] = "1"
    else:
        print(
            "hf_ext: TORCH_DEVICE_BACKEND_AUTOLOAD=0 also holds for child processes of this script; "
            "those that use our names must `import hf_ext`.",
            file=sys.stderr,
        )


def _load_script(arguments: list[str]) -> tuple[CodeType, ModuleType, list[str]]:
    path = os.path.abspath(arguments[0])
    try:
        if os.path.isdir(path):
            path = os.path.join(path, "__main__.py")
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        print(f"hf_ext.run: can't open file {path!r}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    module = ModuleType("__main__")
    module.__file__ = path
    module.__spec__ = module.__loader__ = None
    return _compile(source, path), module, arguments


def _load_module(arguments: list[str]) -> tuple[CodeType, ModuleType, list[str]]:
    name = arguments[0]  # `python -m` has put the working directory on the path already
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a package above it misses something of its own
        spec = None
    if spec is None or not hasattr(spec.loader, "get_code"):
        sys.exit(f"hf_ext.run: no module named {name}, or it cannot be executed")
    module = ModuleType("__main__")
    module.__file__, module.__spec__, module.__loader__ = spec.origin, spec, spec.loader
    module.__package__ = spec.parent
    return spec.loader.get_code(spec.name), module, [spec.origin, *arguments[1:]]


def _compile(source: bytes, path: str) -> CodeType:
    try:
        return compile(source, path, "exec")
    except SyntaxError:
        traceback.print_exc(limit=0)
        sys.exit(1)


def _execute(code: CodeType, module: ModuleType) -> None:
    module.__builtins__ = __builtins__
    sys.modules["__main__"] = module
    try:
        exec(code, module.__dict__)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook = _from_the_script_on(sys.excepthook)
        raise


def _from_the_script_on(hook: Callable) -> Callable:
    """An excepthook that shows the script's own frames only. Python itself goes on to set the exit status."""

    def show(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
        while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
            frames = frames.tb_next
        hook(kind, error.with_traceback(frames), frames)

    return show


if __name__ == "__main__":
    main()
