from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minids import config as c
from minids.cli import COMMANDS, build_parser, main, voice
from minids.errors import InputError, Interrupted
from minids.infer.generate import LanguageModel
from minids.terminal import canonical, to_json
from tests.minids import tiny
from tests.minids.tiny import TEXTS, chats, preferences, write_rows

ROOT = Path(__file__).resolve().parents[2]
MINIDS = [sys.executable, "-m", "minids"]
TINY = (
    "--model.vocab_size 320 --model.hidden_size 32 --model.intermediate_size 48 --model.moe_intermediate_size 16 "
    "--model.n_layers 2 --model.num_attention_heads 2 --model.q_lora_rank 16 --model.kv_lora_rank 16 "
    "--model.qk_nope_head_dim 8 --model.qk_rope_head_dim 8 --model.v_head_dim 8 "
    "--model.n_routed_experts 4 --model.max_position_embeddings 128"
).split()
QUICK = "--train.steps 4 --train.batch_size 2 --train.dtype fp32 --train.device cpu --train.eval_batches 1".split()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command with bad input says."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minids: ") and err.count("\n") == 1 and "Traceback" not in err
    return err.removeprefix("minids: ").strip()


def said(*argv: str) -> str:
    """stdout of a command that succeeds."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert main(argv) == 0
    return stdout.getvalue()


# --- flags and messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["grpo"], f"unknown command 'grpo'; there are: {', '.join(COMMANDS)}"),
        (["pretain"], "unknown command 'pretain'; did you mean 'pretrain'?"),
        (["tokenizer", "trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["tokenizer"], "the following arguments are required: ACTION (see minids tokenizer --help)"),
        (
            ["pretrain", "--trian.steps", "5"],
            "unknown flag '--trian.steps'; did you mean '--train.steps'? (see minids pretrain --help)",
        ),
        (["pretrain", "--train.lr_=5"], "unknown flag '--train.lr_'; did you mean '--train.lr'?"),
        (["sft", "--form", "x"], "unknown flag '--form'; did you mean '--from'?"),
        (["pretrain", "--lr", "1"], "unknown flag '--lr'; did you mean '--train.lr'?"),
        (["pretrain", "--batch", "1"], "unknown flag '--batch'; did you mean '--train.batch_size'?"),
        (["doctor", "--zzzz"], "unknown flag '--zzzz' (see minids doctor --help)"),
        (["doctor", "-z"], "unknown flag '-z'"),
        (["--preset", "nano", "pretrain"], "unknown flag '--preset'"),
        (["doctor", "stray"], "unexpected argument 'stray' (see minids doctor --help)"),
        (["generate", "run"], "the following arguments are required: --prompt"),
        (
            ["generate", "run", "--prompt", "--how_so"],
            "unknown flag '--how-so'; as a value of --prompt it is written --prompt=... (see minids generate --help)",
        ),
        (["generate", "run", "--prompt", "x", "--top-k", "x"], "argument --top-k: invalid int value: 'x'"),
        (["generate", "run", "--prompt", "x", "--temperature", "-1"], "temperature: got -1.0"),
        (["generate", "run", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: got 0, wanted"),
        (["export", "run", "--out", "x", "--to", "onnx"], "argument --to: invalid choice: 'onnx'"),
        (["pretrain"], "--data: not given, neither as a flag nor as 'data' in a --config file"),
        (["sft", "--data", "x", "--out", "y"], "--from: not given"),
        (["pretrain", "--preset", "huge"], "--preset: got 'huge', wanted one of nano, mini, small, v2-lite, v3"),
        (["pretrain", "--train.lr"], "argument --train.lr: expected one argument"),
        (["pretrain", "--train.steps", "ten"], "--train.steps: got 'ten', wanted int"),
        (["sft", "--train.dtype", "fp4"], "--train.dtype: got 'fp4', wanted one of auto, bf16, fp32, fp8"),
        (
            ["pretrain", "--model.n_routed_experts", "8", "--model.n_group", "3"],
            "model.n_group: got 3 groups for 8 routed experts",
        ),
        (["pretrain", "--config", "none.toml"], "none.toml: no such file"),
        (["import", "hf", "--out", ""], "--out: got an empty path, wanted a folder to write"),
    ],
)
def test_mistakes_are_explained_in_one_line(capsys: Any, argv: list[str], message: str) -> None:
    assert message in refused(capsys, *argv)


def test_every_command_has_help(capsys: Any) -> None:
    for command in [[], *([name] for name in COMMANDS), ["tokenizer", "train"]]:
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
        assert "usage: minids" in capsys.readouterr().out
    assert main([]) == 0
    assert all(name in capsys.readouterr().out for name in ["usage: minids"])


def test_version(capsys: Any) -> None:
    import minids

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minids {minids.__version__}\n"


def test_canonical_spelling() -> None:
    assert canonical("--seq_len=a_b-c") == "--seq-len=a_b-c"
    assert canonical("--train.batch-size") == "--train.batch_size"
    assert [canonical(token) for token in ("-1", "a_b", "--", "--not a_flag")] == ["-1", "a_b", "--", "--not a_flag"]


def test_json_is_strict() -> None:
    line = to_json({"nan": float("nan"), "in": [float("inf"), (1, 2.5)], "path": Path("a"), "文": True, 3: None})
    assert "\n" not in line
    assert json.loads(line, parse_constant=pytest.fail) == {
        "nan": None,
        "in": [None, [1, 2.5]],
        "path": "a",
        "文": True,
        "3": None,
    }


def test_help_and_bad_flags_do_not_load_torch() -> None:
    code = "import sys; from minids.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    for argv in (["--version"], ["pretrain", "--nope"], ["sft", "--train.lr", "x", "--from", "a"]):
        result = subprocess.run(
            [sys.executable, "-c", code, *argv], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert result.stdout.split("\n")[-2].endswith("False"), result.stderr


@pytest.mark.parametrize("document", ["README.md", "README.zh.md"])
def test_commands_in_the_readme_exist(document: str) -> None:
    """Every command line shown, in blocks and in passing, is one the parser accepts."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("minids ")]
    lines += [command for command in re.findall(r"`(minids [^`]+)`", text) if "DIR" not in command]
    assert len(lines) > 10
    for line in lines:
        args, rest = build_parser().parse_known_args(shlex.split(line.replace("--help", ""))[1:])
        assert args.command in COMMANDS and not rest, line


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the stages were called with, as (configuration, resume); they train nothing."""
    import minids.train.dpo
    import minids.train.pretrain
    import minids.train.sft

    seen: list[Any] = []
    for stage in ("pretrain", "sft", "dpo"):
        module = getattr(minids.train, stage)
        monkeypatch.setattr(module, stage, lambda config, resume: seen.append((config, resume)) or {"steps": 1})
    return seen


def test_data_may_be_named_once_or_again(configs: Any) -> None:
    assert main(["sft", "--from", "base", "--data", "a", "b", "--out", "run", "--data", "c"]) == 0
    ((config, _),) = configs
    assert config.data == ["a", "b", "c"]


def test_flags_over_file_over_preset_over_defaults(tmp_path: Path, configs: Any, capsys: Any) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('data = "shards"\ntokenizer = "tok"\n[train]\nlr = 1e-3\nsteps = 7\n[model]\nhidden_size = 64\n')
    flags = "--train.lr 3e-4 --train.batch-size=2 --model.n_layers 3 --cross_document_attention --train.grad_clip 0.5"
    assert main(["pretrain", "--preset", "mini", "--config", str(toml), "--out", "run", *flags.split()]) == 0
    assert json.loads(capsys.readouterr().out) == {"steps": 1}
    [(config, resume)] = configs
    model = c.preset("mini", hidden_size=64, num_hidden_layers=3)
    train = c.TrainConfig(lr=3e-4, steps=7, batch_size=2, grad_clip=0.5)
    assert config == c.PretrainConfig(
        data="shards", tokenizer="tok", out="run", model=model, train=train, cross_document_attention=True
    )
    assert resume is False


@pytest.mark.parametrize(("stage", "cls"), [("sft", c.SFTConfig), ("dpo", c.DPOConfig)])
def test_tuning_stages_keep_their_own_defaults(stage: str, cls: Any, configs: Any) -> None:
    argv = [stage, "--from", "base", "--data", "a", "b", "--out", "run", "--seq-len", "64", "--holdout", "0.25"]
    assert main([*argv, "--train.seed", "7", "--resume"]) == 0
    [(config, resume)] = configs
    train = c.from_flags(cls(), {"train.seed": "7"}).train
    assert config == cls(base="base", data=["a", "b"], out="run", seq_len=64, holdout=0.25, train=train)
    assert resume is True


def test_resume_takes_the_settings_of_the_run(tmp_path: Path, configs: Any) -> None:
    """Neither defaults nor the default preset come back; a flag still counts, and so does a preset that is named: the
    run refuses what it did not begin with."""
    stored = c.PretrainConfig(data="d", tokenizer="t", out=str(tmp_path), model=c.preset("mini"))
    (tmp_path / "config.toml").write_text(c.to_toml(stored))
    assert main(["pretrain", "--out", str(tmp_path), "--resume"]) == 0
    assert main(["pretrain", "--out", str(tmp_path), "--resume", "--checkpoint.every", "3"]) == 0
    assert main(["pretrain", "--out", str(tmp_path), "--resume", "--preset", "nano"]) == 0
    other = dataclasses.replace(stored, model=c.preset("nano"))
    assert [config for config, _ in configs] == [stored, c.from_flags(stored, {"checkpoint.every": "3"}), other]


def test_settings_file_mistakes_name_the_file(tmp_path: Path, capsys: Any) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text("[train]\nlrr = 1\n")
    assert refused(capsys, "pretrain", "--config", str(toml)) == (
        f"{toml}: unknown setting 'train.lrr'; did you mean 'train.lr'?"
    )


# --- exit codes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a: got\nb"), 2, "a: got b"),
        (Interrupted("SIGTERM: saved step_000010"), 130, "SIGTERM: saved step_000010"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "x: No space left on device; make room"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device; make room"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), 2, "x: no such file or directory"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "x: permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "x"), 2, "x: read-only file system"),
        (MemoryError(), 2, "out of memory; less is needed by a smaller train.batch_size"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"),
            2,
            "out of memory (asked for 2.50 GiB); less",
        ),
    ],
)
def test_exit_codes(configs: Any, monkeypatch: Any, capsys: Any, error: Any, code: int, line: str) -> None:
    import minids.train.pretrain

    def fail(config: Any, resume: bool) -> None:
        raise error

    monkeypatch.setattr(minids.train.pretrain, "pretrain", fail)
    assert main(["pretrain", "--data", "a", "--tokenizer", "b", "--out", "c"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"minids: {line}") and err.count("\n") == 1


def test_faults_of_the_program_keep_their_traceback(configs: Any, monkeypatch: Any) -> None:
    import minids.train.pretrain

    def fail(config: Any, resume: bool) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(minids.train.pretrain, "pretrain", fail)
    with pytest.raises(OSError, match="Input/output"):
        main(["pretrain", "--data", "a", "--tokenizer", "b", "--out", "c"])


def test_an_allocation_too_large_for_the_machine_is_one_line(
    configs: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import minids.train.pretrain

    monkeypatch.setattr(minids.train.pretrain, "pretrain", lambda config, resume: torch.empty(1 << 60))
    line = refused(capsys, "pretrain", "--data", "a", "--tokenizer", "b", "--out", "c")
    assert line.startswith("out of memory (asked for 4611686018427387904 bytes); ")


def test_other_runtime_errors_keep_their_traceback(configs: Any, monkeypatch: Any) -> None:
    import minids.train.pretrain

    monkeypatch.setattr(minids.train.pretrain, "pretrain", lambda config, resume: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match the size"):
        main(["pretrain", "--data", "a", "--tokenizer", "b", "--out", "c"])


def interrupted(process: subprocess.Popen[str], send: Callable[[], None], until: Callable[[], bool]) -> str:
    """stderr of a command that was sent a signal as soon as `until` said so, and ended by it as it should."""
    deadline = time.monotonic() + 60
    while not until():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.005)
    send()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.fixture
def long_prepare(work: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`prepare` on more text than it is done with when the test is, with two workers, in a process group of its own."""
    texts = itertools.islice(itertools.cycle(TEXTS), 100_000)
    write_rows(tmp_path / "text.jsonl", [{"text": f"{number} {text}"} for number, text in enumerate(texts)])
    argv = f"prepare --data {tmp_path}/text.jsonl --tokenizer {work}/tok --out {tmp_path}/shards --workers 2".split()
    # what a shell starts in the background has SIGINT ignored, and so have its children
    start = "import signal, sys, minids.cli; signal.signal(2, signal.default_int_handler); sys.exit(minids.cli.main())"
    with subprocess.Popen(
        [sys.executable, "-c", start, *argv], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM for one process there")
def test_sigterm_takes_temporary_files_away(long_prepare: subprocess.Popen[str], tmp_path: Path) -> None:
    line = interrupted(long_prepare, long_prepare.terminate, lambda: any(tmp_path.glob(".shards.*")))
    assert line == "minids: SIGTERM: stopped"
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of a process's children on this system")
def test_ctrl_c_while_workers_start_is_one_line(long_prepare: subprocess.Popen[str], tmp_path: Path) -> None:
    children = Path(f"/proc/{long_prepare.pid}/task/{long_prepare.pid}/children")

    def imports() -> bool:
        """Whether a child has come as far as numpy."""
        maps = (Path(f"/proc/{child}/maps") for child in children.read_text().split())
        return any("numpy" in file.read_text() for file in maps)

    line = interrupted(long_prepare, lambda: os.killpg(long_prepare.pid, signal.SIGINT), imports)
    assert line == "minids: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_no_library_takes_sigterm_for_a_fault_of_its_own(configs: Any, monkeypatch: Any) -> None:
    import minids.train.pretrain

    def cover(config: Any, resume: bool) -> None:
        with contextlib.suppress(Exception):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(minids.train.pretrain, "pretrain", cover)
    assert main(["pretrain", "--data", "a", "--tokenizer", "b", "--out", "c"]) == 130


def test_sigterm_is_as_it_was_after_a_command() -> None:
    former = signal.getsignal(signal.SIGTERM)
    said("--version")
    assert signal.getsignal(signal.SIGTERM) is former


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are closed by a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    """As some schedulers start programs."""
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *MINIDS, "--version"],
        capture_output=True,
        env=environment(),
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert bool(result.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_help_says_what_pretraining_starts_from(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"--model.hidden_size X default {c.preset('nano').hidden_size} " in text


def test_reader_of_stdout_went_away() -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*MINIDS, "--help"], stdout=write, stderr=subprocess.PIPE, env=environment(), timeout=60)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_stdout_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*MINIDS, "--version"], stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=60
        )
    assert result.returncode == 2
    assert result.stderr.startswith(b"minids: No space left on device") and result.stderr.count(b"\n") == 1


# --- every stage, on a tiny model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, tok/, shards/, base/, sft/ and dpo/, each made by its command."""
    folder = tmp_path_factory.mktemp("cli")
    text = write_rows(folder / "text.jsonl", [{"text": text} for text in TEXTS])
    rows = write_rows(folder / "chats.jsonl", chats(24))
    pairs = write_rows(folder / "pairs.jsonl", preferences(24))
    made = {}
    with contextlib.chdir(folder):
        made["tok"] = said("tokenizer", "train", "--data", text, "--vocab-size", "320", "--out", "tok")
        made["shards"] = said(
            *["prepare", "--data", text, "--tokenizer", "tok", "--out", "shards", "--seq-len", "32"],
            *["--holdout", "0.3", "--workers", "1"],
        )
        made["base"] = said("pretrain", "--data", "shards", "--tokenizer", "tok", "--out", "base", *TINY, *QUICK)
        made["sft"] = said("sft", "--from", "base", "--data", rows, "--out", "sft", "--seq-len", "64", *QUICK)
        made["dpo"] = said("dpo", "--from", "sft", "--data", pairs, "--out", "dpo", "--seq-len", "64", *QUICK)
    (folder / "made.json").write_text(json.dumps(made))
    return folder


def test_stages_print_one_json_object(work: Path) -> None:
    for name, output in json.loads((work / "made.json").read_text()).items():
        assert output.count("\n") == 1, name
        report = json.loads(output)
        assert isinstance(report, dict) and report
        if name in ("base", "sft", "dpo"):
            assert report["steps"] == 4
            assert {"config.toml", "tokenizer", "metrics.jsonl", "report.md", "step_000004"} <= {
                path.name for path in (work / name).iterdir()
            }


def test_run_folder_in_use_and_finished(work: Path, capsys: Any) -> None:
    with contextlib.chdir(work):
        assert "--resume" in refused(capsys, "sft", "--from", "base", "--data", "chats.jsonl", "--out", "sft")
        assert refused(capsys, "dpo", "--out", "sft", "--resume") == (
            "sft: holds a run of 'sft', which dpo --resume cannot continue; give another --out"
        )
        assert json.loads(said("sft", "--out", "sft", "--resume"))["steps"] == 4


def test_eval(work: Path) -> None:
    report = json.loads(said("eval", str(work / "base"), "--data", str(work / "text.jsonl"), "--device", "cpu"))
    assert report["bits_per_byte"] > 0 and report["rows"] == len(TEXTS)


def test_generate_streams_what_json_reports(work: Path) -> None:
    argv = ["generate", str(work / "dpo"), "--prompt", "The red", "--max-new-tokens", "12"]
    report = json.loads(said(*argv, "--json"))
    assert said(*argv) == report["text"] + "\n"
    assert said(*argv, "--temperature", "0") == report["text"] + "\n"
    assert report["new_tokens"] == 12 or report["finish"] == "stop"
    sampled = ["--temperature", "2.0", "--seed", "3"]
    assert said(*argv, *sampled) == said(*argv, *sampled)
    assert json.loads(said(*argv, "--json", "--chat"))["prompt_tokens"] != report["prompt_tokens"]


@pytest.mark.parametrize(
    ("flags", "device", "quick_bf16", "stored", "dtype"),
    [
        ([], "cpu", True, "float32", "float32"), ([], "cpu", True, "bfloat16", "bfloat16"),
        ([], "cpu", True, "float16", "float32"), ([], "cpu", False, "bfloat16", "float32"),
        (["--dtype", "bf16"], "cpu", False, "float32", "bfloat16"), ([], "cuda", True, "float32", "bfloat16"),
        ([], "cuda", False, "float32", "float32"), (["--dtype", "fp32"], "cuda", True, "bfloat16", "float32"),
    ],
)  # fmt: skip
def test_dtype_of_weights(
    flags: list[str], device: str, quick_bf16: bool, stored: str, dtype: str, monkeypatch: Any
) -> None:
    tokenizer = tiny.tokenizer()

    def load(path: str, where: torch.device, dtype: torch.dtype | None) -> Any:
        assert where.type == device
        model = LanguageModel(tiny.model_config(tokenizer.vocab_size))
        return model.to(getattr(torch, stored) if dtype is None else dtype), tokenizer

    monkeypatch.setattr("minids.loading.load", load)
    monkeypatch.setattr("minids.train.loop.pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: quick_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": quick_bf16})
    model = voice(build_parser().parse_args(["chat", "run", *flags])).model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_chat_answers_each_line_and_remembers(work: Path, monkeypatch: Any) -> None:
    def talk(lines: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return said("chat", str(work / "dpo"), "--max-new-tokens", "8", "--repetition-penalty", "3").split("\n")

    first = talk("3 and 1?\n")
    both = talk("3 and 1?\n\n5 and 1?\n/clear\n3 and 1?\n")
    assert len(both) == 4  # three answers, each ended by a line break
    assert both[0] == both[2] == first[0]


def test_export_loads_in_transformers_and_comes_back(work: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM

    out = tmp_path / "hf"
    assert json.loads(said("export", str(work / "dpo"), "--to", "hf", "--out", str(out)))
    assert json.loads(said("import", str(out), "--out", str(tmp_path / "back")))
    prompt = ["--prompt", "The red", "--max-new-tokens", "8"]
    texts = [said("generate", str(folder), *prompt) for folder in (work / "dpo", out, tmp_path / "back")]
    assert texts[0] == texts[1] == texts[2]
    theirs, tokenizer = DeepseekV3ForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer("The red").input_ids])
    new = theirs.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) + "\n" == texts[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "{tmp}/nothing", "--prompt", "x"], "nothing"),
        (["chat", "{work}/tok"], "tok"),
        (["eval", "{work}/base", "--data", "{tmp}/none.jsonl"], "none.jsonl"),
        (["export", "{work}/shards", "--to", "hf", "--out", "{tmp}/o"], "shards"),
        (["export", "{work}/base", "--to", "hf", "--out", "{work}/tok"], "already exists and is not empty"),
        (["import", "{work}/tok", "--out", "{tmp}/o"], "tok"),
        (["prepare", "--data", "{work}/text.jsonl", "--tokenizer", "{tmp}/t", "--out", "{tmp}/o"], "{tmp}/t"),
        (["prepare", "--data", "{tmp}/none.*", "--tokenizer", "{work}/tok", "--out", "{tmp}/o"], "none.*"),
        (["tokenizer", "train", "--data", "{tmp}/empty.jsonl", "--out", "{tmp}/o"], "empty.jsonl"),
        (
            ["sft", "--from", "{work}/base", "--data", "{work}/text.jsonl", "--out", "{tmp}/o"],
            "no conversation to train on",
        ),
        (["dpo", "--from", "{tmp}/x", "--data", "{work}/pairs.jsonl", "--out", "{tmp}/o"], "{tmp}/x"),
        (
            [
                "prepare",
                "--data",
                "{work}/text.jsonl",
                "--tokenizer",
                "{work}/tok",
                "--out",
                "{tmp}/o",
                "--seq-len",
                "0",
            ],
            "seq_len: got 0, wanted a whole number >= 2",
        ),
        (
            ["prepare", "--data", "", "--tokenizer", "{work}/tok", "--out", "{tmp}/o"],
            "--data: got an empty path, wanted a file, a folder or a pattern",
        ),
        (
            ["prepare", "--data", "{work}/text.jsonl", "--tokenizer", "{work}/tok", "--out", "{tmp}/o", "--seed", "-1"],
            "seed: got -1, wanted a whole number from 0 to below 2^63",
        ),
        (
            ["tokenizer", "train", "--data", "{work}/text.jsonl", "--out", "{tmp}/o", "--seed", "-1"],
            "seed: got -1, wanted a whole number from 0 to below 2^63",
        ),
        (
            ["generate", "{work}/base", "--prompt", "x", "--seed", "9223372036854775808"],
            "--seed: got 9223372036854775808, wanted a whole number from 0 to below 2^63",
        ),
        (
            ["eval", "{work}/base", "--data", "{work}/text.jsonl", "--batch-size", "0"],
            "--batch-size: got 0, wanted a whole number >= 1",
        ),
        (
            [
                "pretrain",
                "--data",
                "{work}/shards",
                "--tokenizer",
                "{work}/tok",
                "--out",
                "{tmp}/o",
                *TINY,
                "--train.batch_size",
                "1000000000",
            ],
            "train.batch_size: got 1000000000 rows of 32 tokens, wanted fewer than 2^31 tokens",
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    work: Path, tmp_path: Path, capsys: Any, argv: list[str], message: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    places = {"{work}": str(work), "{tmp}": str(tmp_path)}

    def place(text: str) -> str:
        for name, path in places.items():
            text = text.replace(name, path)
        return text

    assert place(message) in refused(capsys, *map(place, argv))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]


LONG = "x" * 300


@pytest.mark.parametrize(
    "argv",
    [
        ["prepare", "--data", LONG, "--tokenizer", "tok", "--out", "o"],
        ["prepare", "--data", "text.jsonl", "--tokenizer", LONG, "--out", "o"],
        ["prepare", "--data", "text.jsonl", "--tokenizer", "tok", "--out", LONG],
        ["tokenizer", "train", "--data", "text.jsonl", "--out", LONG],
        ["pretrain", "--data", "shards", "--tokenizer", "tok", "--out", LONG],
        ["pretrain", "--data", LONG, "--tokenizer", "tok", "--out", "o"],
        ["sft", "--from", LONG, "--data", "chats.jsonl", "--out", "o"],
        ["export", "base", "--to", "hf", "--out", LONG],
        ["export", LONG, "--to", "hf", "--out", "o"],
        ["import", LONG, "--out", "o"],
        ["eval", LONG, "--data", "text.jsonl"],
        ["generate", LONG, "--prompt", "x"],
    ],
    ids=lambda argv: " ".join(argv).replace(LONG, "LONG"),
)
def test_too_long_names_are_one_line(work: Path, monkeypatch: Any, capsys: Any, argv: list[str]) -> None:
    monkeypatch.chdir(work)
    assert LONG in refused(capsys, *argv)
    assert not (work / "o").exists()


def test_export_on_a_full_disk(work: Path, tmp_path: Path, capsys: Any) -> None:
    resource = pytest.importorskip("resource", reason="limits of a process are POSIX's")
    out, before = tmp_path / "hf", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as a full disk, without root
    try:
        line = refused(capsys, "export", str(work / "base"), "--to", "hf", "--out", str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line == f"{out}: File too large; make room and run the same command again"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process there")
def test_interrupt_saves_and_exits_130(work: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = f"pretrain --data {work}/shards --tokenizer {work}/tok --out {run}".split() + TINY + QUICK
    argv += "--train.steps 100000 --train.log_every 1 --checkpoint.every 0".split()
    process = subprocess.Popen(
        [*MINIDS, *argv], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = run / "metrics.jsonl"
    line = interrupted(
        process,
        lambda: process.send_signal(signal.SIGINT),
        lambda: metrics.is_file() and metrics.read_text().count('"train"') > 1,
    )
    assert "saved" in line
    assert len(list(run.glob("step_*"))) == 1


def test_the_tokenizer_is_the_one_that_was_trained_with(work: Path, tmp_path: Path, capsys: Any) -> None:
    """Other words under the same ids would be nonsense, not an error, later."""
    run, rows = tmp_path / "run", str(work / "text.jsonl")
    shutil.copytree(work / "base", run)
    said("generate", str(run), "--prompt", "x", "--max-new-tokens", "1")
    shutil.rmtree(run / "tokenizer")
    said("tokenizer", "train", "--data", rows, "--vocab-size", "300", "--out", str(run / "tokenizer"))
    for argv in (
        ["generate", str(run), "--prompt", "x"], ["eval", str(run), "--data", rows],
        ["sft", "--from", str(run), "--data", str(work / "chats.jsonl"), "--out", str(tmp_path / "o")],
        ["export", str(run), "--to", "hf", "--out", str(tmp_path / "o")],
    ):  # fmt: skip
        assert f"{run}/tokenizer: holds another tokenizer (" in refused(capsys, *argv)
    assert not (tmp_path / "o").exists()
