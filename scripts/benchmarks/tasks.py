"""Tasks beside training: generating text, and turning text into tokens."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import BENCH, mpirun, print_report, speed_ratios, time_sides

GENERATED_TOKENS = 128
FILES = 240  # files of the embedded corpus: some megabytes


def generate(args: argparse.Namespace) -> None:
    """Compare greedy generation from the same weights, with one thread each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mpilm.comm.base import SelfComm
    from mpilm.config.schema import GenerateConfig
    from mpilm.data.tokenizer import bytes_tokenizer
    from mpilm.inference.arguments import InferenceCompute, InferenceParallel, ModelFolder, to_config
    from mpilm.inference.generate import generate
    from mpilm.inference.load import config_from_folder, load_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    prompt = list(range(1, 17))  # transformers ignores its padding token, 0, in a prompt
    with tempfile.TemporaryDirectory() as folder:
        theirs = LlamaForCausalLM(shape).eval()
        theirs.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(bytes_tokenizer().json)
        config = to_config(ModelFolder(folder), InferenceParallel(), InferenceCompute(device="cpu", threads=1))
        ours = load_model(config_from_folder(config), SelfComm())
        settings = GenerateConfig(max_tokens=GENERATED_TOKENS, temperature=0.0)
        tokens = generate(ours, {0: prompt}, settings, eos=-1)[0]

        def transformers_generate(_: int) -> None:
            generated = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=GENERATED_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )  # fmt: skip
            assert generated[0, len(prompt) :].tolist() == tokens

        sides = {
            "mpilm": lambda _: generate(ours, {0: prompt}, settings, eos=-1) and None,
            "transformers": transformers_generate,
        }
        times, void = time_sides(sides, args.rounds, SelfComm())
    ratios = speed_ratios(times, "transformers", "mpilm")
    print_report(f"generate, {GENERATED_TOKENS} tokens", times, {"mpilm / transformers": (ratios, ">= 1.00")}, void)


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

    def by_one_rank(number: int) -> None:
        if comm.rank == 0:
            make_tokens(data, folder / f"alone-{number}", SelfComm())

    def by_library(_: int) -> None:
        """Read the files and encode them with the library alone."""
        if comm.rank == 0:
            for path in sorted((folder / "texts").iterdir()):
                library.encode_batch_fast([path.read_text()], add_special_tokens=False)

    sides = {
        "2 ranks": lambda number: make_tokens(data, folder / f"two-{number}", comm) and None,
        "1 rank": by_one_rank,
        "tokenizers library": by_library,
    }
    times, void = time_sides(sides, args.rounds, comm)
    if comm.rank == 0:
        ratios = {
            "2 ranks / 1 rank": (speed_ratios(times, "1 rank", "2 ranks"), ">= 1.70"),
            "1 rank / library": (speed_ratios(times, "tokenizers library", "1 rank"), ">= 0.90"),
        }
        print_report("prepare", times, ratios, void)


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
