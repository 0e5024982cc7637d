"""The commands of `palm-rlhf data`: clean, filter and convert files of conversations and preferences."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, Union

from beartype import beartype
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from palm_rlhf.data.command_files import check_eval, offers_to_skip, refuse_existing, seekable
from palm_rlhf.data.command_summary import CommandSummary
from palm_rlhf.data.convert import Form, Target, converted_records, form_of
from palm_rlhf.data.curation.cleaning import Html, mend_turns, to_markdown
from palm_rlhf.data.curation.context_length import fit_context, num_utf8_bytes
from palm_rlhf.data.curation.deduplicate import conversation_digest, drop_duplicates, drop_near_duplicates
from palm_rlhf.data.curation.filters import (
    drop_blocked_words,
    drop_provider_errors,
    drop_repeated_digits,
    drop_short,
    keep_languages,
    keep_model,
)
from palm_rlhf.data.curation.held_out import is_held_out
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import write_records

File = Annotated[Positional[str], arg(metavar="FILE")]
Out = Annotated[str, arg(metavar="OUT.jsonl|.csv|.parquet")]
Number = Annotated[int | None, arg(metavar="INT")]
Share = Annotated[float | None, arg(metavar="0..1")]
Name = Annotated[str | None, arg(metavar="NAME")]
Words = Annotated[tuple[str, ...], arg(metavar="WORD ...", help_behavior_hint="(default: none)")]
Codes = Annotated[tuple[str, ...], arg(metavar="CODE ...", help_behavior_hint="(default: all)")]


@offers_to_skip
@beartype
def clean(
    file: File,
    *,
    out: Out,
    html: Html = "auto",
    keep_duplicates: bool = False,
    ignore_fields: Words = (),
    skip_broken: bool = False,
    overwrite: bool = False,
) -> None:
    """Mend conversations: HTML to Markdown, roles in order, no words of buttons, provider errors or duplicates.

    Each is written as {"messages": [{"role", "content"}]}, with its id, model, condition and tools.

    Args:
        file: Conversations in any format (ShareGPT, a web page, messages, Alpaca, ChatGPT), or a folder of them; -
            is stdin.
        out: Where to write; - is stdout, and the summary then goes to stderr.
        html: The messages to convert to Markdown; auto converts those of a chat's page, and leaves HTML that a user
            asked for.
        keep_duplicates: Keep conversations with the same messages as an earlier one.
        ignore_fields: Fields to leave out although they hold text that the format has no place for.
        skip_broken: Count and name records that cannot be read, and continue.
        overwrite: Write over a file that exists.
    """
    refuse_existing(overwrite, out)
    summary = CommandSummary()
    records = to_markdown(
        summary.read(file, skip_broken, ignore_fields), html, rejected=summary.rejected, mended=summary.mended
    )
    records = mend_turns(records, rejected=summary.rejected, mended=summary.mended)
    records = drop_provider_errors(records, rejected=summary.rejected)
    if not keep_duplicates:
        records = drop_duplicates(records, rejected=summary.rejected)
    write_records(out, summary.written(records))
    summary.report(out)


@offers_to_skip
@beartype
def filter_conversations(
    file: File,
    *,
    out: Out,
    model: Name = None,
    lang: Codes = (),
    blocked_words: Words = (),
    repeated_digits: Number = None,
    min_tokens: Number = None,
    near_duplicates: Share = None,
    context: Number = None,
    overlong: Literal["split", "truncate"] = "split",
    tokenizer: Annotated[str | None, arg(metavar="FOLDER")] = None,
    overhead: Annotated[int, arg(metavar="INT")] = 0,
    eval_fraction: Annotated[float, arg(metavar="0..1")] = 0.0,
    eval_out: Annotated[str | None, arg(metavar="EVAL.jsonl")] = None,
    ignore_fields: Words = (),
    skip_broken: bool = False,
    overwrite: bool = False,
) -> None:
    """Choose conversations by model, language, words and length; fit them to a context; hold some out.

    It reads the files that clean reads (best cleaned before) and writes the same lines. The steps follow in the order
    of the options.

    Args:
        file: A file that clean writes or reads; - is stdin.
        out: Where to write; - is stdout, and the summary then goes to stderr.
        model: Keep the conversations of this model only, such as gpt-4.
        lang: Keep the conversations in one of these languages only (ISO 639-1), such as en de.
        blocked_words: Leave out conversations with one of these words, in any case, also inside other words.
        repeated_digits: Leave out conversations with a digit so often in a row (Vicuna took 9).
        min_tokens: Leave out shorter conversations.
        near_duplicates: Leave out conversations that share so much of their text with an earlier one, such as 0.8.
        context: The most tokens of a conversation.
        overlong: Split longer ones between exchanges so that none is lost, or keep the exchanges that fit.
        tokenizer: Counts the tokens: a tokenizer.json, a folder with it or of a run, a .gguf file, a hub id, or
            smollm2; bytes by default.
        overhead: The tokens that the chat template adds to each message.
        eval_fraction: The share of conversations to hold out, chosen by their hash before any is split.
        eval_out: Where to write the conversations that are held out.
        ignore_fields: Fields to leave out although they hold text that the format has no place for.
        skip_broken: Count and name records that cannot be read, and continue.
        overwrite: Write over a file that exists.
    """
    refuse_existing(overwrite, out, eval_out)
    check_eval(eval_fraction, eval_out, out)
    summary = CommandSummary()
    rejected = summary.rejected
    count_tokens = _counter(tokenizer)
    records = summary.read(file, skip_broken, ignore_fields)
    if model is not None:
        records = keep_model(records, model, rejected=rejected)
    if lang:
        records = keep_languages(records, lang, rejected=rejected)
    if blocked_words:
        records = drop_blocked_words(records, blocked_words, rejected=rejected)
    if repeated_digits is not None:
        records = drop_repeated_digits(records, repeated_digits, rejected=rejected)
    if min_tokens is not None:
        records = drop_short(records, min_tokens, count_tokens=count_tokens, rejected=rejected)
    if near_duplicates is not None:
        records = drop_near_duplicates(records, near_duplicates, rejected=rejected)

    fitted: Callable[[Iterable[Record]], Iterator[Record]] = iter
    if context is not None:
        fitted = partial(
            fit_context,
            context=context,
            overlong=overlong,
            count_tokens=count_tokens,
            overhead=overhead,
            rejected=rejected,
            mended=summary.mended,
        )
    with tempfile.TemporaryFile("w+", encoding="utf-8") as held_out:
        write_records(out, summary.written(fitted(_hold_out(records, eval_fraction, held_out))))
        if eval_out is not None:
            held_out.seek(0)
            write_records(eval_out, summary.written(fitted(map(json.loads, held_out)), "eval_"))
    summary.report(out, eval_out)


@offers_to_skip
@beartype
def convert(
    file: File,
    *,
    to: Target,
    out: Out,
    form: Form = "auto",
    lang: Codes = (),
    top_k: Number = None,
    max_replies: Number = None,
    html: Html = "auto",
    ignore_fields: Words = (),
    skip_broken: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a file in any known format to one that a trainer reads.

    It reads Open-Assistant, ShareGPT, messages, Alpaca rows (instruction, input, output; question and answer),
    ChatGPT's conversations.json (the current branch of each conversation), and files that compare replies: chosen and
    rejected, HH's transcripts, Nectar's ranked answers, responses with ranks or scores; and single replies with a
    label, true or false, for whether people want them (prompt, completion, label, as TRL has them for KTO).

    sft writes lines {"messages": [{"role", "content"}]}, rankings {"prompt": [messages], "responses": [best first]},
    prompts {"prompt": [messages]}, preferences {"prompt": [messages], "chosen", "rejected"}, and unpaired {"prompt":
    [messages], "completion", "label"}, for rankings with the best reply as wanted and the worst as unwanted; alpaca and
    sharegpt write the conversations of sft in those formats.

    Args:
        file: JSON, CSV, parquet or a web page; - is stdin, which cannot be CSV.
        to: What to write.
        out: Where to write; - is stdout, and the summary then goes to stderr.
        form: The format of the file; auto decides by its first record. hh is any file that compares replies.
        lang: Keep records in one of these languages only, such as en de; pt-BR names a region of Open-Assistant.
        top_k: Keep only the replies of Open-Assistant that rank above this (counted from 0).
        max_replies: Keep only so many replies of a ranking, the best.
        html: The messages to convert to Markdown; auto converts those of a chat's page, in ShareGPT's export only.
        ignore_fields: Fields to leave out although they hold text that the format has no place for.
        skip_broken: Count and name records that cannot be read, and continue.
        overwrite: Write over a file that exists.
    """
    refuse_existing(overwrite, out)
    summary = CommandSummary()
    with seekable(file) if form == "auto" else nullcontext(file) as path:
        records = converted_records(
            path,
            form_of(path, skip_broken=skip_broken) if form == "auto" else form,
            to,
            lang=lang,
            top_k=top_k,
            max_replies=max_replies,
            html=html,
            skip_broken=skip_broken,
            ignored=ignore_fields,
            rejected=summary.rejected,
            mended=summary.mended,
        )
        write_records(out, summary.written(records))
    summary.report(out)


def _counter(tokenizer: str | None) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text."""
    if tokenizer is None:
        return num_utf8_bytes
    from palm_rlhf.data.tokenizer import load_tokenizer
    from palm_rlhf.model.local_model import local_model
    from palm_rlhf.model.weights_folder import ADAPTER_CONFIG, TOKENIZER_FILES

    files = (*TOKENIZER_FILES, ADAPTER_CONFIG)
    folder = tokenizer if os.path.isfile(tokenizer) else local_model(tokenizer, files=files)
    encode = load_tokenizer(folder).encode
    return lambda text: len(encode(text))


def _hold_out(records: Iterable[Record], fraction: float, held_out: IO[str]) -> Iterator[Record]:
    """Yield the records to train on; the others are written to the file `held_out`."""
    for record in records:
        if is_held_out(conversation_digest(record), fraction):
            held_out.write(json.dumps(record) + "\n")
        else:
            yield record


COMMANDS = {"clean": clean, "filter": filter_conversations, "convert": convert}
if TYPE_CHECKING:
    Command = Any
else:
    Command = Union[  # noqa: UP007
        tuple(Annotated[Any, subcommand(name=name, constructor=run)] for name, run in COMMANDS.items())
    ]


def data(command: OmitSubcommandPrefixes[OmitArgPrefixes[Command]]) -> None:
    """Clean, filter and convert conversations and preferences, whatever the size of the file.

    Formats, recognised by their content: Open-Assistant trees and messages; ShareGPT (conversations or items, or a
    saved web page); messages of OpenAI and the hub; Alpaca, Dolly, Orca and other rows of a question with its answer;
    ChatGPT's conversations.json; prompts; and files that compare replies: chosen and rejected (of HH, UltraFeedback,
    LlamaFactory, Stack Exchange), ranked answers (Nectar), and responses with ranks or scores.

    Files, packed with gzip or not: JSON in lines, one array or objects over several lines; CSV and TSV; parquet. The
    name of the file to write chooses among lines of JSON, .csv, .tsv and .parquet, and .gz packs it.

    No text is dropped silently: a record is rejected, by the name of the field, if a field holds text that its format
    does not know; a field of single words is left out and counted, and only metadata such as source or score is not
    mentioned. Every command ends with a summary on stdout: a table, and then one line of JSON that counts the records
    written, mended, and rejected by the reason.
    """
