"""Score a text with a checkpoint of mpilm or a Hugging Face folder: loss, perplexity, bits per byte.

The text is cut into windows of the context length. Each token but the first is predicted once; a bert model predicts masked
tokens. The ranks divide the windows among them; the result does not depend on the number of ranks.

$ python -m mpilm.evaluate --model.init-from runs/NAME/checkpoints/step-00000360 --data.path book.txt
$ mpirun -n 4 python -m mpilm.evaluate --model.init-from FOLDER --data.path books/ --documents true
"""

import sys

from mpilm.comm.base import Comm
from mpilm.config.parse import parse
from mpilm.inference.arguments import EvaluateArguments
from mpilm.launch.run import Body, run


def main() -> Body:
    arguments = parse(sys.argv[1:], EvaluateArguments(), "evaluate", __doc__ or "")

    def body(comm: Comm) -> None:
        from mpilm.inference.evaluate import evaluate_model

        evaluate_model(arguments, comm)

    return body


if __name__ == "__main__":
    run(main)
