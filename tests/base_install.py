"""A process that has the base install alone: every module of an extra is missing."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_EXTRAS = """
import sys
from facediffuser.extras import EXTRAS
sys.modules.update({module: None for modules in EXTRAS.values() for module in modules})
"""


def in_base_install(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code with arguments in `folder`, in a process that can import no module of an extra."""
    command = [sys.executable, "-c", WITHOUT_EXTRAS + code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


def command_in_base_install(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line in `folder`, in a process that can import no module of an extra."""
    code = "from facediffuser.flows.cli import main\nsys.exit(main(sys.argv[1:]))"
    return in_base_install(code, *arguments, folder=folder)
