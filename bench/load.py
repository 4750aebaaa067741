"""How long from a model's file to the first step and to the first token, cold and warm, against transformers?

SmolLM2-135M-Instruct from its Q4_1 GGUF file, and from a safetensors folder with the same weights in bfloat16 that is
made first; or the files that `--model` names. llama.cpp takes no step and writes its first token beside ours. Every
measurement is a process of its own: it starts, imports, loads, and takes one step (prompt and query of 16 tokens, one
example) or writes one token behind a short chat. Seconds are from the call that loads to the result; the imports
before that call have a column of their own. "Cold": the file's pages were dropped from the page cache first, those of
the programs' own libraries were not. "Warm": they are in the cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import files
from bench.harness.arguments import add_machine, positive
from bench.harness.files import ModelFile
from bench.harness.markdown import table
from bench.harness.rows import Row, row
from bench.harness.worker import environment

CHECKS = ("tests/engine/test_gradient.py::test_smollm2_equals_transformers",)
OURS = {"embedgrad, GGUF as stored": ("gguf", "stored"), "embedgrad, GGUF to float32": ("gguf", "compute"),
        "embedgrad, safetensors": ("safetensors", "compute")}  # fmt: skip
OTHERS = {"transformers, GGUF": "gguf", "transformers, safetensors": "safetensors"}
LLAMA = "llama.cpp, GGUF"  # writes, and takes no step
POINTS = ("step", "token")
ONCE = ("transformers, GGUF",)  # slow, so measured once: warm, to the first step
TOKENS = 16
MESSAGES = (("system", "You are a helpful assistant."), ("user", "What is a river?"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    files.add_argument(parser)
    parser.add_argument("--repeats", type=positive, default=2, help="warm processes of each (default 2)")
    add_machine(parser, device=False)
    parser.add_argument("--worker", choices=(*OURS, *OTHERS, LLAMA), help=argparse.SUPPRESS)
    parser.add_argument("--point", choices=POINTS, default="step", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    if args.worker:
        print(json.dumps(_measure(args.worker, args.point, args.path)), flush=True)
        return []
    with files.model_files(args.model) as found:
        return [one for file in found for one in _of_file(file, args)]


def _of_file(file: ModelFile, args: argparse.Namespace) -> list[Row]:
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        paths = _contenders(file, Path(folder))
        for point in POINTS[:1] if args.quick else POINTS:
            for name, path in paths.items():
                if _left_out(name, point, args.quick):
                    continue
                few = args.quick or name in ONCE
                for state in (*(() if name in ONCE else ("cold",)), *["warm"] * (1 if few else args.repeats)):
                    if state == "cold":
                        _forget(path)
                    found[name, point, state].append(_ask(name, point, path, args.threads))
                seconds = found[name, point, "warm"][-1]["seconds"]
                print(f"{file.title}: {name}, first {point}: {seconds:.2f} s warm", flush=True)
    return [
        row("load", name, answers[0]["version"], [a["seconds"] for a in answers],
            case={"model": file.title, "types": file.types, "point": point, "state": state, "threads": args.threads},
            import_seconds=statistics.median(a["import_seconds"] for a in answers),
            load_seconds=statistics.median(a["load_seconds"] for a in answers),
            whole_seconds=statistics.median(a["whole_seconds"] for a in answers))
        for (name, point, state), answers in found.items()
    ]  # fmt: skip


def _contenders(file: ModelFile, folder: Path) -> dict[str, Path]:
    """Who takes part, with the path that each loads. SmolLM2 is there as safetensors as well, in `folder`."""
    from embedgrad.tasks import smollm2

    if file.path == smollm2.path():
        paths = {"gguf": file.path, "safetensors": write_safetensors(folder)}
    else:
        paths = {"gguf" if file.path.suffix == ".gguf" else "safetensors": file.path}
    names = {**{name: kind for name, (kind, _) in OURS.items()}, **OTHERS}
    found = {name: paths[kind] for name, kind in names.items() if kind in paths}
    if "gguf" in paths and importlib.util.find_spec("xllamacpp") is not None:
        found[LLAMA] = file.path
    return found


def _left_out(name: str, point: str, quick: bool) -> bool:
    if quick and name not in OURS:
        return True
    return (name in ONCE and point == "token") or (name == LLAMA and point == "step")


def write_safetensors(folder: Path) -> Path:
    """SmolLM2 as a Hugging Face folder in bfloat16."""
    import torch
    from safetensors.torch import save_file

    from embedgrad.model.checkpoint import read_checkpoint
    from embedgrad.model.files.gguf import GgufFile
    from embedgrad.model.files.gguf_tokenizer import build_backend
    from embedgrad.tasks import smollm2

    source = read_checkpoint(smollm2.path())
    c, tokenizer = source.config, source.tokenizer
    tensors = {name: source.tensors.get(name).to(torch.bfloat16).contiguous() for name in c.shapes()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    build_backend(GgufFile(smollm2.path()).metadata, "SmolLM2").save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template, **tokenizer.special,
    }))  # fmt: skip
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": c.rms_eps,
        "rope_theta": c.rope.theta, "max_position_embeddings": c.max_position, "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "tie_word_embeddings": c.tied,
        "torch_dtype": "bfloat16", "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids[0],
    }))  # fmt: skip
    return folder


def _forget(path: Path) -> None:
    """Drop a model's files from the page cache."""
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _ask(name: str, point: str, path: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench", "load", "--worker", name, "--point", point, "--path", str(path)]
    started = time.monotonic()
    done = subprocess.run(command, env=environment(threads), stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} did not get to its first {point}; its message stands above.")
    answer = json.loads(lines[-1])
    answer["whole_seconds"] = answer.pop("finished") - started
    return answer


# ---- the contenders' side --------------------------------------------------------------------------------------------


def _measure(name: str, point: str, path: Path) -> dict[str, Any]:
    started = time.monotonic()
    if name == LLAMA:
        return _llama(path, started)
    ours = name in OURS
    if ours:
        import embedgrad
        import embedgrad.engine.gradient
        import embedgrad.engine.model  # what `load_model` imports when it is first asked for

        version = f"embedgrad {embedgrad.__version__}"
    else:
        import torch
        import transformers

        version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    imported = time.monotonic()
    model = _load_ours(path, OURS[name][1]) if ours else _load_transformers(path, point)
    loaded = time.monotonic()
    (_our_result if ours else _their_result)(model, point)
    finished = time.monotonic()
    return {"version": version, "import_seconds": imported - started, "load_seconds": loaded - imported,
            "seconds": finished - imported, "finished": finished}  # fmt: skip


def _llama(path: Path, started: float) -> dict[str, Any]:
    import xllamacpp

    imported = time.monotonic()
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.verbosity = 1, 512, -1
    threads = int(os.environ["OMP_NUM_THREADS"])
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    loaded = time.monotonic()
    messages = [{"role": role, "content": text} for role, text in MESSAGES]
    server.handle_chat_completions({"messages": messages, "max_tokens": 1, "temperature": 0.0})
    finished = time.monotonic()
    return {"version": f"xllamacpp {importlib.metadata.version('xllamacpp')}", "import_seconds": imported - started,
            "load_seconds": loaded - imported, "seconds": finished - imported, "finished": finished}  # fmt: skip


def _load_ours(path: Path, weights: str) -> Any:
    import embedgrad

    return embedgrad.load_model(path, weights=weights)


def _our_result(model: Any, point: str) -> None:
    import embedgrad
    from bench.harness.contenders import Case, our_step

    if point == "step":
        our_step(model, Case(TOKENS, TOKENS, 1), "all")()
    else:
        (_, system), (_, query) = MESSAGES
        prompt = embedgrad.SoftPrompt.from_text(model, system)
        embedgrad.generate(model, prompt, [query], embedgrad.Sampling(max_new_tokens=1))


def _load_transformers(path: Path, point: str) -> Any:
    import torch
    import transformers

    where, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    tokenizer = None
    if point == "token":
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    return model.eval().requires_grad_(False), tokenizer


def _their_result(loaded: Any, point: str) -> None:
    import torch

    from bench.harness.contenders import Case, autograd_step

    model, tokenizer = loaded
    if point == "step":
        autograd_step(model, model, model.config.vocab_size, Case(TOKENS, TOKENS, 1), torch.device("cpu"))()
        return
    messages = [{"role": role, "content": text} for role, text in MESSAGES]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with torch.no_grad():
        model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=1, do_sample=False)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`load`: from the call that loads to the first step and the first token."""
    parts = []
    for title, of_model in files.by_model(rows).items():
        parts += [f"**{title}**", _table(of_model)]
    return {"load": "\n\n".join(parts)}


def _table(rows: Sequence[Row]) -> str:
    found = {(one.contender, one.case["point"], one.case["state"]): one for one in rows}
    names = list(dict.fromkeys(one.contender for one in rows))
    cells = []
    for name in names:
        line: list[object] = [name]
        for point in POINTS:
            for state in ("cold", "warm"):
                one = found.get((name, point, state))
                line.append(f"{one.median:.2f} s" if one else None)
        one = found.get((name, "step", "warm"), found.get((name, "token", "warm")))
        assert one is not None
        whole = f"{one.more['whole_seconds']:.2f} s" if one.case["point"] == "step" else None
        cells.append([*line, f"{one.more['import_seconds']:.2f} s", whole])
    heads = ("", "first step, cold", "warm", "first token, cold", "warm", "imports before it", "whole process to the "
             "first step, warm")  # fmt: skip
    return table(heads, cells)


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """Of the first model: imports, loading and the first result, warm."""
    import matplotlib.pyplot as plt

    from bench.harness import pictures as draw

    rows = next(iter(files.by_model(rows).values()))
    points = list(dict.fromkeys(str(one.case["point"]) for one in rows))
    names = list(dict.fromkeys(one.contender for one in rows))
    figure, panels = plt.subplots(1, len(points), figsize=(4.4 * len(points), 2.6), sharey=True, squeeze=False)
    for axes, point in zip(panels[0], points, strict=True):
        found = [one for one in rows if one.case["point"] == point and one.case["state"] == "warm"]
        draw.stacked_bars(axes, [names.index(one.contender) for one in found], [
            ("imports", "#BBBBBB", [one.more["import_seconds"] for one in found]),
            ("loading", draw.OURS_TOO, [one.more["load_seconds"] for one in found]),
            (f"first {point}", draw.OURS, [one.median - one.more["load_seconds"] for one in found]),
        ])  # fmt: skip
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("seconds, warm")
        axes.legend(fontsize=8)
    panels[0][0].invert_yaxis()
    return {"load": figure}
