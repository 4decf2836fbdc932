"""What is done beside training: writing text, and turning text into tokens."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import BENCH, mpirun, pairwise, report, rounds

WRITTEN = 128  # tokens of a text
FILES = 240  # of the embedded corpus: some megabytes


def generate(args: argparse.Namespace) -> None:
    """A text from the same weights, greedily, one thread each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mpilm.comm.base import SelfComm
    from mpilm.config.inference import InferenceCompute, InferenceParallel, ModelFolder, to_config
    from mpilm.config.schema import GenerateConfig
    from mpilm.data.tokenizer import bytes_tokenizer
    from mpilm.inference.generate import generate
    from mpilm.inference.load import config_from_folder, load_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    prompt = list(range(1, 17))  # transformers takes its padding token, 0, for no part of a prompt
    with tempfile.TemporaryDirectory() as folder:
        theirs = LlamaForCausalLM(shape).eval()
        theirs.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(bytes_tokenizer().json)
        config = to_config(ModelFolder(folder), InferenceParallel(), InferenceCompute(device="cpu", threads=1))
        ours = load_model(config_from_folder(config), SelfComm()).model
        settings = GenerateConfig(max_tokens=WRITTEN, temperature=0.0)
        written = generate(ours, {0: prompt}, settings, stop=-1)[0]

        def transformers_generate(_: int) -> None:
            found = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=WRITTEN, do_sample=False, eos_token_id=None, pad_token_id=0
            )  # fmt: skip
            assert found[0, len(prompt) :].tolist() == written

        sides = {
            "mpilm": lambda _: generate(ours, {0: prompt}, settings, stop=-1) and None,
            "transformers": transformers_generate,
        }
        times, void = rounds(sides, args.rounds, SelfComm())
    ratios = pairwise(times, "transformers", "mpilm")
    report(f"generate, {WRITTEN} tokens", times, {"mpilm / transformers": (ratios, ">= 1.00")}, void)


def prepare_worker(args: argparse.Namespace) -> None:
    from mpilm.comm.base import SelfComm
    from mpilm.comm.mpi import mpi_world
    from mpilm.config.schema import DataConfig
    from mpilm.data.prepare import prepare_tokens as make_tokens
    from mpilm.data.tokenizer import load_tokenizer

    comm = mpi_world().with_options(gpu_aware=False, yield_while_waiting=True)
    folder = Path(args.folder)
    data = DataConfig(path=(str(folder / "texts"),), tokenizer=str(folder / "tokenizer.json"))
    library = load_tokenizer(folder / "tokenizer.json")._library

    def alone(number: int) -> None:
        if comm.rank == 0:
            make_tokens(data, folder / f"alone-{number}", SelfComm())

    def by_hand(_: int) -> None:
        """Read the files, and let the library encode them."""
        if comm.rank == 0:
            for path in sorted((folder / "texts").iterdir()):
                library.encode_batch_fast([path.read_text()], add_special_tokens=False)

    sides = {
        "2 ranks": lambda number: make_tokens(data, folder / f"two-{number}", comm) and None,
        "1 rank": alone,
        "tokenizers library": by_hand,
    }
    times, void = rounds(sides, args.rounds, comm)
    if comm.rank == 0:
        ratios = {
            "2 ranks / 1 rank": (pairwise(times, "1 rank", "2 ranks"), ">= 1.70"),
            "1 rank / library": (pairwise(times, "tokenizers library", "1 rank"), ">= 0.90"),
        }
        report("prepare", times, ratios, void)


def prepare(args: argparse.Namespace) -> None:
    from mpilm.data.sources import find_sources
    from mpilm.data.tokenizer import train_bpe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        texts = [Path(source.path).read_bytes().decode(errors="replace") for source in find_sources("")[:FILES]]
        (folder / "tokenizer.json").write_text(train_bpe(texts[:100], 8192).json)
        for i in range(0, len(texts), 8):
            (folder / "texts" / f"{i:04}.txt").write_text("".join(texts[i : i + 8]))
        words = ["--rounds", str(args.rounds), "--folder", name]
        one_thread = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [*mpirun(2), sys.executable, BENCH, "prepare-worker", *words]
        raise SystemExit(subprocess.run(command, env=one_thread).returncode)
