"""Text generation: sequences sampled token by token, several in flight if the model is distributed; the generate command."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks, run_on_root
from mpilm.config.schema import Config, GenerateConfig
from mpilm.data.batch import Batch
from mpilm.data.chat import ChatTemplate, find_chat_template
from mpilm.data.files import is_valid_utf8, parse_json, read_bytes
from mpilm.data.tokenizer import Tokenizer, fit_to_model, tokenizer_from_spec
from mpilm.engine.pipelined import PipelinedModel
from mpilm.errors import ConfigError, DataError, FileError, NonFiniteError
from mpilm.formatting import ProgressLine
from mpilm.inference.load import config_from_folder, load_model
from mpilm.model.sequence_info import KVCache

COLDEST = 1e-30  # lower temperatures overflow; the most likely token is as good


@dataclass
class GeneratedSequence:
    tokens: list[int]
    window: int  # tokens that the model attends to
    capacity: int  # tokens that the whole sequence can have
    generator: torch.Generator
    cache: KVCache = field(init=False)
    cached: int = 0  # tokens whose keys and values are in the cache

    def next_batch(self, device: torch.device) -> Batch:
        """Return what the model reads next: the last token, or the whole window if the cache is empty or full."""
        if not 0 < self.cached < self.window:
            self.cache = KVCache(min(self.window, self.capacity))
            self.cached = max(0, len(self.tokens) - self.window)
            positions = torch.arange(len(self.tokens) - self.cached)
        else:
            positions = torch.tensor([self.cached])
        tokens = torch.tensor(self.tokens[self.cached :])
        self.cached = min(len(self.tokens), self.window)
        return Batch(tokens[None], tokens[None], positions, tokens[:1], len(tokens)).to(device)


@torch.no_grad()
def generate(
    model: PipelinedModel, prompts: Mapping[int, list[int]], settings: GenerateConfig, eos: int,
    on_done: Callable[[int], None] = lambda number: None,
) -> dict[int, list[int]]:  # fmt: skip
    """Return what follows each prompt (not empty; by number), at most max-tokens, up to `eos`. A text depends on its prompt,
    number and the settings alone. Collective over the pipeline axis with the same prompts; with ZeRO-3 over the whole mesh."""
    in_flight = 2 * len(model.blocks_per_stage) if len(model.blocks_per_stage) > 1 else 1  # so that no stage idles long
    numbers, window = list(prompts) if settings.max_tokens else [], model.config.model.context_length
    generated = {number: list[int]() for number in prompts}
    for first in range(0, len(numbers), in_flight):
        active = dict[int, GeneratedSequence]()
        for number in numbers[first : first + in_flight]:
            generator = torch.Generator().manual_seed((settings.seed + number) % 2**63)
            capacity = len(prompts[number]) + settings.max_tokens
            active[number] = GeneratedSequence(list(prompts[number]), window, capacity, generator)
        while active:
            batches = {number: sequence.next_batch(model.device) for number, sequence in active.items()}
            logits = model.next_logits(batches, {number: sequence.cache for number, sequence in active.items()})
            for number, token in zip(list(active), _sample_tokens(model, active, logits, settings)):
                if token != eos:
                    active[number].tokens.append(token)
                    generated[number].append(token)
                if token == eos or len(generated[number]) == settings.max_tokens:
                    del active[number]
                    on_done(number)
    return generated


def _sample_tokens(
    model: PipelinedModel, active: Mapping[int, GeneratedSequence], logits: Mapping[int, Tensor], settings: GenerateConfig
) -> list[int]:
    """Sample the next token of each sequence on the rank with the logits, and broadcast them along the pipeline."""
    tokens = torch.zeros(len(active), dtype=torch.int64)
    for place, (number, sequence) in enumerate(active.items()):
        if number in logits:
            tokens[place] = sample_token(logits[number].cpu(), settings, sequence.generator)
    model.pipeline.broadcast(tokens, (len(model.blocks_per_stage) - 1) % model.pipeline.size)
    return tokens.tolist()


def sample_token(logits: Tensor, settings: GenerateConfig, generator: torch.Generator) -> int:  # (V,)
    """Draw a token after temperature, top-k and top-p (Holtzman et al., arXiv 1904.09751). Raises NonFiniteError."""
    if not torch.isfinite(logits).all():
        raise NonFiniteError("the model's logits are not finite; its weights probably are not either")
    if settings.temperature < COLDEST:
        return int(logits.argmax())
    sorted_logits, tokens = (logits / settings.temperature).sort(descending=True, stable=True)
    probs = sorted_logits.softmax(dim=0)
    if settings.top_k:
        probs[settings.top_k :] = 0.0
    mass_before = probs.cumsum(dim=0) - probs
    probs[1:][mass_before[1:] >= settings.top_p] = 0.0
    return int(tokens[torch.multinomial(probs, 1, generator=generator)])


def generate_texts(config: Config, world: Comm) -> None:
    """Print a prompt and its continuation; for a file of prompts, a JSON object each: prompt, text. Collective."""
    config = run_on_all_ranks(world, lambda: config_from_folder(config))
    settings = config.generate
    tokenizer = run_on_all_ranks(world, lambda: fit_to_model(tokenizer_from_spec(config.data.tokenizer), config.model))
    template = run_on_all_ranks(world, lambda: _load_template(config))
    prompts: list[str] = world.broadcast_json(run_on_root(world, lambda: _read_prompts(settings)))
    model = load_model(config, world)
    data = model.mesh.comm("data")  # all other axes work together on each prompt
    own = range(data.rank, len(prompts), data.size)
    tokens = run_on_all_ranks(world, lambda: {n: _encode(prompts[n], tokenizer, template) for n in own})
    progress, done = ProgressLine("generating", "texts", world.rank == 0 and len(prompts) > 1), count(1)
    generated = generate(model, tokens, settings, tokenizer.eos, lambda _: progress(next(done), len(tokens)))
    is_first = not any(index for axis, index in model.mesh.coordinate.items() if axis != "data")  # of those with the same texts
    everyone = world.all_gather_json([[n, tokenizer.decode(ids)] for n, ids in generated.items()] if is_first else [])
    if world.rank == 0:
        for (_, text), prompt in zip(sorted(pair for pairs in everyone for pair in pairs), prompts, strict=True):
            if settings.prompts:
                print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
            else:
                print(text if settings.chat else prompt + text)
        sys.stdout.flush()


def _load_template(config: Config) -> ChatTemplate | None:
    """Return the chat template of a chat; raise ConfigError if the model cannot generate or has no template."""
    if config.model.arch == "bert":
        raise ConfigError(f"{config.model.init_from} is a bert model: it fills masks and cannot continue a text")
    if not config.generate.chat:
        return None
    template = find_chat_template(config.data.tokenizer)
    if template is None:
        raise ConfigError(f"--generate.chat true needs a chat template, and {config.data.tokenizer} has none")
    return template


def _read_prompts(settings: GenerateConfig) -> list[str]:
    if not settings.prompts:
        return [settings.prompt]
    if settings.prompt:
        raise ConfigError("--generate.prompt and --generate.prompts exclude each other; remove one of them")
    source = f"--generate.prompts {'standard input' if settings.prompts == '-' else settings.prompts}"
    try:
        data = sys.stdin.buffer.read() if settings.prompts == "-" else read_bytes(Path(settings.prompts).expanduser())
        lines = [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except FileError as error:
        raise FileError(f"--generate.prompts {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 at byte {error.start}") from None
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise DataError(f"{source} contains no prompts")
    if not source.endswith(".jsonl"):
        return lines
    return [_parse_prompt(line, f"{source}: line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _parse_prompt(line: str, place: str) -> str:
    value = parse_json(line, place)
    if not isinstance(value.get("prompt"), str):
        raise DataError(f'{place} is not an object with a "prompt" that is a string')
    if not is_valid_utf8(value["prompt"]):
        raise DataError(f"{place} contains half a surrogate pair, which is not text")
    return value["prompt"]


def _encode(prompt: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    if template is not None:
        text = template.render([{"role": "user", "content": prompt}], "the prompt", begin_answer=True)
        return tokenizer.encode_rendered(text)[0].tolist()
    return tokenizer.encode(prompt).tolist() or [tokenizer.eos]
