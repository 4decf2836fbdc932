"""The console command `mpilm`: mpilm NAME is python -m mpilm.NAME. Alone it lists the commands; it imports nothing large."""

import difflib
import runpy
import sys

import mpilm
from mpilm.errors import ConfigError, is_first_process, print_uncaught_error
from mpilm.formatting import command_text, format_value

COMMANDS = {
    "init": "write a config to start from and batch scripts into a new folder",
    "train": "train a language model, or continue a run",
    "prepare": "turn text into token files",
    "generate": "write text with a trained model",
    "evaluate": "score a text with a trained model",
    "fetch": "download a model from the Hugging Face Hub",
    "merge": "fold a LoRA adapter into its base model",
    "doctor": "check this MPI and these nodes; calibrate the planner",
    "plan": "predict step time and memory of layouts before a job is queued",
    "watch": "show a run while it trains",
    "report": "make one HTML page of a run, or of several",
    "verify": "prove that every layout gives the same bits here",
    "audit": "recompute steps of a run, or find where two runs part",
    "replay": "show the tensors or the text of one step of a run",
    "completion": "print a script that completes these commands in a shell",
}


def main() -> None:
    """Run the command that the first argument names."""
    sys.excepthook = print_uncaught_error
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"mpilm.{name}", run_name="__main__", alter_sys=True)
        return
    if name not in ("-h", "--help", "--version"):
        close = difflib.get_close_matches(name[:100], COMMANDS, n=1)
        advice = f"did you mean {command_text(close[0])}?" if close else f"the commands are {', '.join(COMMANDS)}"
        if is_first_process():
            print(f"mpilm: error: there is no command {format_value(name)}; {advice}", file=sys.stderr, flush=True)
        sys.exit(ConfigError.code)
    if is_first_process():
        print(f"mpilm {mpilm.__version__}" if name == "--version" else _list_commands())


def _list_commands() -> str:
    call, rows = command_text("COMMAND"), "".join(f"  {name:<12}{text}\n" for name, text in COMMANDS.items())
    usage = f"usage: {call} [--section.key VALUE ...]\n       mpirun -n 8 {call} [--section.key VALUE ...]"
    end = f"{call} --help explains a command and its settings."
    return f"mpilm {mpilm.__version__}: language-model training over MPI\n\n{usage}\n\n{rows}\n{end}"


if __name__ == "__main__":
    main()
