"""Generate text with a checkpoint of mpilm or a Hugging Face folder of a Llama, GPT-2, Qwen or Mixtral model.

The ranks divide the prompts among them; the texts do not depend on the number of ranks.

$ python -m mpilm.generate --model.init-from runs/NAME/checkpoints/step-00000360 --generate.prompt "def main("
$ mpirun -n 4 python -m mpilm.generate --model.init-from FOLDER --generate.prompts prompts.txt > texts.jsonl
"""

import sys

from mpilm.comm.base import Comm
from mpilm.config.parse import parse
from mpilm.inference.arguments import GenerateArguments, to_config
from mpilm.launch.run import Body, run


def main() -> Body:
    arguments = parse(sys.argv[1:], GenerateArguments(), "generate", __doc__ or "")
    config = to_config(arguments.model, arguments.parallel, arguments.train, generate=arguments.generate)

    def body(comm: Comm) -> None:
        from mpilm.inference.generate import generate_texts

        generate_texts(config, comm)

    return body


if __name__ == "__main__":
    run(main)
