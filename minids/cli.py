"""The `minids` command: argparse in, one stage function called, one JSON object out.

Each command imports what it needs only when it runs, so that help and bad flags answer without loading torch.

stdout: a stage prints exactly one JSON object, its last line. `generate` streams its text instead (with `--json`: one
JSON object), `chat` is a conversation. Progress and messages go to stderr.

Exit codes: 0 done; 2 bad input, one line on stderr; 130 interrupted, training having saved a checkpoint; 141 the reader
of stdout went away.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import minids
from minids.config import (
    ALIASES,
    PRESETS,
    DPOConfig,
    PretrainConfig,
    SFTConfig,
    from_dict,
    from_flags,
    load_toml,
    preset,
    setting_names,
    to_dict,
)
from minids.errors import FULL, InputError, Interrupted
from minids.signals import answered_by
from minids.terminal import Parser, canonical, emit, to_json

if TYPE_CHECKING:
    from minids.talk import Voice
    from minids.train.run import StageConfig

C = TypeVar("C", PretrainConfig, SFTConfig, DPOConfig)
BAD_INPUT, INTERRUPTED = 2, 130
SETTING = "setting:"  # opens the argparse destination of a flag that is a field of the configuration


@dataclass(frozen=True)
class Command:
    """`arguments` adds its flags to a parser; `run` does the work and returns what is printed as JSON, if anything."""

    help: str
    arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], dict[str, Any] | None]


# --- configuration of training: defaults < preset < --config file < flags -------------------------------------------


def add_settings(parser: Parser, defaults: StageConfig, own: Sequence[str]) -> None:
    """--config, --resume, and a flag for every field but those in `own`, which the command spells itself."""
    parser.add_argument("--config", metavar="TOML", help="settings from a file; flags override it")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with the settings it has")
    group = parser.add_argument_group("settings", "each is also a key of the --config file; see minids/config.py")
    names = [name for name in setting_names(type(defaults)) if name not in own]
    names += [short for short, full in ALIASES.items() if full in names]
    if "model.rope_scaling.factor" in names:
        names.append("model.rope_scaling")  # the section as a whole: only "none"
    for name in names:
        default: Any = to_dict(defaults)
        for part in ALIASES.get(name, name).split("."):
            default = default.get(part) if isinstance(default, dict) else "off"
        bare: Any = {"nargs": "?", "const": "true"} if isinstance(default, bool) else {}
        group.add_argument(
            canonical(f"--{name}"),
            dest=SETTING + name,
            default=argparse.SUPPRESS,
            metavar="X",
            help=f"default {default}",
            **bare,
        )


def require_stage(out: str, command: str) -> None:
    from minids.train.checkpoint import latest_checkpoint, read_state

    checkpoint = latest_checkpoint(out)
    stage = read_state(checkpoint)["stage"] if checkpoint else command
    if stage != command:
        raise InputError(
            f"{out}: holds a run of {stage!r}, which {command} --resume cannot continue; give another --out"
        )


def stage_config(args: argparse.Namespace, base: C, own: Sequence[str]) -> C:
    """The run's configuration. With --resume, the run folder's own config.toml replaces defaults."""
    stored = Path(args.out or "") / "config.toml"
    if args.resume and args.out and stored.is_file():
        require_stage(args.out, args.command)
        base = from_dict(type(base), load_toml(stored), base, where=f"{stored}: ")
    if isinstance(base, PretrainConfig) and args.preset:
        base = dataclasses.replace(base, model=preset(args.preset))
    if args.config:
        base = from_dict(type(base), load_toml(args.config), base, where=f"{args.config}: ")
    flags = {key.removeprefix(SETTING): value for key, value in vars(args).items() if key.startswith(SETTING)}
    flags |= {name: getattr(args, name) for name in own if getattr(args, name) is not None}
    config = from_flags(base, flags)
    for name in own:
        if not getattr(config, name):
            flag = "from" if name == "base" else name
            raise InputError(f"--{flag}: not given, neither as a flag nor as {name!r} in a --config file")
    return config


# --- commands -------------------------------------------------------------------------------------------------------


def quickstart_arguments(parser: Parser) -> None:
    parser.add_argument("--out", default="runs/quickstart", metavar="DIR", help="default runs/quickstart")
    parser.add_argument("--minutes", type=float, metavar="M", help="about how long all stages together may take")
    parser.add_argument("--data", **FILES, help="your own text or chats instead of the built-in corpus")
    parser.add_argument("--resume", action="store_true", help="go on with what an interrupted quickstart left in --out")


def quickstart(args: argparse.Namespace) -> dict[str, Any]:
    from minids.quickstart import quickstart

    options = {"minutes": args.minutes} if args.minutes is not None else {}
    return quickstart(args.out, data=args.data, resume=args.resume, **options)


def tokenizer_arguments(parser: Parser) -> None:
    train = parser.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "train", help="train a byte-level BPE on row files"
    )
    train.add_argument("--data", required=True, **FILES, help="row files, folders or patterns")
    train.add_argument("--out", required=True, metavar="DIR")
    train.add_argument("--vocab-size", type=int, default=6400, metavar="N", help="default 6400")
    train.add_argument("--like", metavar="DIR", help="take over another tokenizer's settings and special tokens")
    train.add_argument(
        "--sample-bytes", type=int, default=32 << 20, metavar="N", help="text to train on, default 32 MiB"
    )
    train.add_argument("--seed", type=int, default=0)


def tokenizer_train(args: argparse.Namespace) -> dict[str, Any]:
    from minids.tokenizer import train_tokenizer

    return train_tokenizer(args.data, args.vocab_size, args.out, args.like, args.sample_bytes, args.seed)


def prepare_arguments(parser: Parser) -> None:
    data = "row files, folders or patterns, each with a weight if wanted: PATH=0.7"
    parser.add_argument("--data", required=True, **FILES, help=data)
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the token shards")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens in a packed row, default 512")
    parser.add_argument("--fim-rate", type=float, default=0.1, metavar="P", help="fill-in-the-middle, default 0.1")
    parser.add_argument("--split-rate", type=float, default=0.1, metavar="P", help="joined tokens split, default 0.1")
    parser.add_argument("--holdout", type=float, metavar="P", help="share held out, default 0.005, more of small data")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row instead of counting it")
    parser.add_argument("--workers", type=int, metavar="N", help="processes, default one per core")
    parser.add_argument("--seed", type=int, default=0)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    from minids.data.prepare import prepare

    return prepare(
        args.data,
        args.tokenizer,
        args.out,
        seq_len=args.seq_len,
        fim_rate=args.fim_rate,
        split_rate=args.split_rate,
        holdout=args.holdout,
        strict=args.strict,
        workers=args.workers,
        seed=args.seed,
    )


PRETRAIN_OWN = ("data", "tokenizer", "out")
PRETRAIN_DEFAULTS = PretrainConfig(model=preset("nano"))
TUNE_OWN = ("data", "base", "out")


def pretrain_arguments(parser: Parser) -> None:
    parser.add_argument("--data", metavar="SHARDS", help="folder written by minids prepare")
    parser.add_argument("--tokenizer", metavar="DIR")
    parser.add_argument("--out", metavar="RUN", help="run folder")
    parser.add_argument("--preset", metavar="NAME", help=f"{', '.join(PRESETS)}; default nano")
    add_settings(parser, PRETRAIN_DEFAULTS, PRETRAIN_OWN)


def pretrain(args: argparse.Namespace) -> dict[str, Any]:
    config = stage_config(args, PRETRAIN_DEFAULTS, PRETRAIN_OWN)
    from minids.train.pretrain import pretrain

    return pretrain(config, resume=args.resume)


def tune_arguments(defaults: StageConfig) -> Callable[[Parser], None]:
    def arguments(parser: Parser) -> None:
        parser.add_argument("--from", dest="base", metavar="RUN", help="run folder or checkpoint to start from")
        parser.add_argument("--data", **FILES, help="row files, folders or patterns")
        parser.add_argument("--out", metavar="RUN", help="run folder")
        add_settings(parser, defaults, TUNE_OWN)

    return arguments


def sft(args: argparse.Namespace) -> dict[str, Any]:
    config = stage_config(args, SFTConfig(), TUNE_OWN)
    from minids.train.sft import sft

    return sft(config, resume=args.resume)


def dpo(args: argparse.Namespace) -> dict[str, Any]:
    config = stage_config(args, DPOConfig(), TUNE_OWN)
    from minids.train.dpo import dpo

    return dpo(config, resume=args.resume)


MODEL_HELP = "run folder, one of its checkpoints, or a Hugging Face DeepseekV3 folder"


def evaluate_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="RUN", help=MODEL_HELP)
    parser.add_argument("--data", required=True, **FILES, help="row files, folders or patterns")
    parser.add_argument("--seq-len", type=int, metavar="N", help="longest context; longer texts are cut into pieces")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of matrix products")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from minids.evaluate.perplexity import bits_per_byte

    return bits_per_byte(args.model, args.data, args.seq_len, args.batch_size, args.device, args.dtype)


def sampling_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="RUN", help=MODEL_HELP)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default 256, or what the model has room for")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="default 0: all tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default 1: all tokens")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="default 1: none")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bf16", "fp32"],
        help="of weights; auto: bf16 on a GPU, on a CPU as stored if it multiplies quickly in that, else fp32",
    )


def voice(args: argparse.Namespace) -> Voice:
    """The model and how to sample from it; bad sampling settings are found before the model is read."""
    from minids.infer.sampling import Sampling
    from minids.loading import load
    from minids.precision import pick_dtype
    from minids.talk import Voice
    from minids.train.loop import pick_device

    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: got {args.max_new_tokens}, wanted a whole number >= 1")
    device = pick_device(args.device)
    dtype, as_stored = pick_dtype(args.dtype, device), args.dtype == "auto" and device.type == "cpu"
    model, tokenizer = load(args.model, device, None if as_stored else dtype)
    if as_stored and model.lm_head.weight.dtype != dtype:
        model.float()
    return Voice(model, tokenizer, sampling, args.max_new_tokens, args.seed)


def generate_arguments(parser: Parser) -> None:
    sampling_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message, not text to continue")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text as it is made")


def generate(args: argparse.Namespace) -> dict[str, Any] | None:
    speaker = voice(args)
    if args.chat:
        messages = [{"role": "user", "content": args.prompt}]
        ids, _ = speaker.tokenizer.encode_chat(messages, add_generation_prompt=True)
    else:
        ids = speaker.tokenizer.encode(args.prompt, add_bos=True)
    said: list[int] = []
    pieces = speaker.stream(ids, said)
    if not args.json:
        for piece in pieces:
            emit(piece)
        emit("\n")
        return None
    began = time.perf_counter()
    text = "".join(pieces)
    seconds = time.perf_counter() - began
    return {
        "prompt": args.prompt,
        "text": text,
        "prompt_tokens": len(ids),
        "new_tokens": len(said),
        "finish": "stop" if said[-1] in speaker.stops else "length",
        "seconds": round(seconds, 3),
    }


def chat_arguments(parser: Parser) -> None:
    sampling_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")


def chat(args: argparse.Namespace) -> None:
    """One line in, one answer out, to the end of stdin. Ctrl-C stops an answer, and at the prompt leaves."""
    from minids.talk import Conversation

    conversation = Conversation(voice(args), args.system)
    prompt = ""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # line editing, where the platform has it
            import readline  # noqa: F401
        print("/clear forgets the conversation, Ctrl-D leaves", file=sys.stderr)
        prompt = "> "
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "/clear":
            conversation.clear()
        elif line:
            try:
                for piece in conversation.say(line):
                    emit(piece)
            except InputError as error:  # a message that is too long ends itself, not the conversation
                print(f"minids: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print("  (stopped)", file=sys.stderr)
            emit("\n")


def export_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="RUN", help="run folder or one of its checkpoints")
    parser.add_argument("--to", required=True, choices=["hf"], help="hf: a Hugging Face DeepseekV3 folder")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: as stored")
    parser.add_argument("--max-shard-size", type=int, default=5_000_000_000, metavar="BYTES", help="default 5 GB")


def export(args: argparse.Namespace) -> dict[str, Any]:
    from minids.convert.hf import export_hf

    return export_hf(args.model, args.out, args.dtype, args.max_shard_size)


def import_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="HF_DIR", help="Hugging Face DeepseekV3 folder")
    parser.add_argument("--out", required=True, metavar="RUN")


def import_model(args: argparse.Namespace) -> dict[str, Any]:
    from minids.convert.hf import import_hf

    return import_hf(args.model, args.out)


def doctor(args: argparse.Namespace) -> dict[str, Any]:
    from minids.doctor import doctor

    return doctor()


def no_arguments(parser: Parser) -> None:
    pass


COMMANDS = {
    "quickstart": Command("train a mini DeepSeek-V3 on this machine and talk to it", quickstart_arguments, quickstart),
    "tokenizer": Command("train a tokenizer", tokenizer_arguments, tokenizer_train),
    "prepare": Command("clean, tokenise and pack text into token shards", prepare_arguments, prepare),
    "pretrain": Command("train a model from nothing on token shards", pretrain_arguments, pretrain),
    "sft": Command("fine-tune on conversations", tune_arguments(SFTConfig()), sft),
    "dpo": Command("train on preference pairs", tune_arguments(DPOConfig()), dpo),
    "eval": Command("bits per byte and perplexity on row files", evaluate_arguments, evaluate),
    "chat": Command("talk with a model", chat_arguments, chat),
    "generate": Command("continue a text", generate_arguments, generate),
    "export": Command("write a checkpoint in another format", export_arguments, export),
    "import": Command("make a run folder of a Hugging Face model", import_arguments, import_model),
    "doctor": Command("what this machine has, what is missing, how to get it", no_arguments, doctor),
}


def build_parser() -> Parser:
    parser = Parser(prog="minids", description="A mini DeepSeek-V3, trained from scratch.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.help))
    return parser


def run(argv: Sequence[str]) -> None:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r} (see minids {args.command} --help)")
    if getattr(args, "out", None) == "":
        raise InputError("--out: got an empty path, wanted a folder to write")
    if args.version:
        emit(f"minids {minids.__version__}\n")
    elif args.command is None:
        parser.print_help()
    else:
        result = COMMANDS[args.command].run(args)
        if result is not None:
            emit(to_json(result) + "\n")


# OSErrors about a path the user named; others are faults of the program and keep their traceback.
FILES: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "FILE"}  # of --data, which may be repeated
PATH_ERRORS = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP),
}


def os_error_text(error: OSError) -> str | None:
    """One line for an OSError that the user can mend, else None."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in FULL:
        return f"{where}{error.strerror}; make room and run the same command again"
    if error.errno in PATH_ERRORS and error.filename:
        return f"{where}{(error.strerror or 'cannot be used').lower()}"
    return None


def memory_error_text(error: MemoryError | RuntimeError) -> str | None:
    """One line for an allocation that failed, here or on a GPU; None for other RuntimeErrors."""
    text = str(error)
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # PyTorch's, which is loaded only where it is needed
        or "can't allocate memory" in text
        or "not enough memory" in text
    ):
        return None
    size = re.search(r"to allocate (\d[\d.]* ?\w+)", text)
    asked = f" (asked for {size[1]})" if size else ""
    return (
        f"out of memory{asked}; less is needed by a smaller train.batch_size, which train.grad_accumulation_steps "
        "makes up for, by a shorter seq_len and by a smaller model"
    )


def stop(number: int, frame: Any) -> None:
    """Ends a command at SIGTERM as SIGINT does, so that its temporary files go. Training has its own answer."""
    raise Interrupted("SIGTERM: stopped")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        with answered_by(stop, signal.SIGTERM):
            run(sys.argv[1:] if argv is None else argv)
        return 0
    except InputError as error:
        code, text = BAD_INPUT, str(error)
    except Interrupted as error:
        code, text = INTERRUPTED, str(error)
    except KeyboardInterrupt:
        code, text = INTERRUPTED, "interrupted"
    except (OSError, MemoryError, RuntimeError) as error:
        line = os_error_text(error) if isinstance(error, OSError) else memory_error_text(error)
        if line is None:
            raise
        code, text = BAD_INPUT, line
    print(f"minids: {' '.join(text.split())}", file=sys.stderr)
    return code
