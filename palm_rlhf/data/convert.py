"""Files in any of the known formats, converted to the records that trainers read."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Literal

from beartype import beartype

from palm_rlhf.data.curation.cleaning import Html, mend_turns, to_markdown, whole_prompts
from palm_rlhf.data.curation.filters import keep_languages
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import read_records, unexpected_record
from palm_rlhf.data.formats import oasst_trees
from palm_rlhf.data.formats.chatgpt_export import is_chatgpt
from palm_rlhf.data.formats.conversation_files import read_conversations
from palm_rlhf.data.formats.conversation_records import TOOLS, is_messages, is_sharegpt, parse_conversation
from palm_rlhf.data.formats.conversation_writers import to_instructions, to_sharegpt
from palm_rlhf.data.formats.instructions import is_instruction, is_prompt
from palm_rlhf.data.formats.oasst_messages import MessageFilter, OasstMessage
from palm_rlhf.data.formats.prompt_fields import FIELDS
from palm_rlhf.data.formats.saved_pages import is_page
from palm_rlhf.data.preferences.ranking_files import is_preference, pairs_of, read_rankings
from palm_rlhf.data.preferences.unpaired_files import read_unpaired, unpaired_of

Known = Literal["oasst", "sharegpt", "hh", "messages", "alpaca", "chatgpt", "prompts"]
Form = Literal["auto", Known]
Target = Literal["sft", "rankings", "prompts", "preferences", "unpaired", "alpaca", "sharegpt"]
Path = str | os.PathLike[str]
# Preferences come before conversations: a conversation may stand beside the replies as their prompt.
RECOGNISED: dict[Known, Callable[[Record], bool]] = {
    "oasst": oasst_trees.is_oasst,
    "hh": is_preference,
    "chatgpt": is_chatgpt,
    "sharegpt": is_sharegpt,
    "messages": is_messages,
    "alpaca": is_instruction,
    "prompts": is_prompt,
}
EXPECTED = (
    "one of Open-Assistant (message_id, role, text, or a tree of such), ShareGPT (conversations), messages, rows of "
    "a question and its answer (instruction, output, ...), ChatGPT's export (mapping), or preferences (chosen and "
    "rejected, responses, or ranked answers), or prompts"
)
PARTS_OF_A_QUESTION = (*FIELDS, *TOOLS, "condition")
WRITERS: dict[Target, Callable[..., Iterator[Record]]] = {"alpaca": to_instructions, "sharegpt": to_sharegpt}
ROWS = ("alpaca", "prompts")  # the formats with one question in a record
KEPT = ("tools", "condition")  # a reply depends on them, too


@beartype
def form_of(path: Path, *, skip_broken: bool = False) -> Known:
    """Return the format of a file by its first record; an empty file has that of messages.

    Raises ValueError if the record has no known format. With `skip_broken` the first record that can be read decides.
    """
    if is_page(path):
        return "sharegpt"
    for line, record in read_records(path, skip_broken=skip_broken):
        for form, is_form in RECOGNISED.items():
            if is_form(record):
                return form
        raise unexpected_record(path, line, record, EXPECTED)
    return "messages"


@beartype
def converted_records(
    path: Path,
    form: Known,
    to: Target,
    *,
    lang: Sequence[str] = (),
    top_k: int | None = None,
    max_replies: int | None = None,
    html: Html = "auto",
    skip_broken: bool = False,
    ignored: Collection[str] = (),
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
) -> Iterator[Record]:
    """Return the records of a file as a trainer reads them, or as conversations in the formats `alpaca` and `sharegpt`.

    Raises ValueError if the format cannot become the target, and the errors of the readers.

    Args:
        path: The file.
        form: Its format.
        to: The target.
        lang: The languages to keep, as the file names them, or as the text tells.
        top_k: See `oasst_trees.walk`.
        max_replies: Keeps the best replies of a ranking only.
        html: The messages to convert to Markdown, see `to_markdown`; `auto` looks at the format of ShareGPT only.
        skip_broken: See `read_records`.
        ignored: Fields to leave out although they may hold text.
        rejected: Counts the records that are left out by their reasons.
        mended: Counts the changes by their kinds.
    """
    _check_conversion(form, to, top_k, max_replies, html)
    rejected = Counter() if rejected is None else rejected
    if to in WRITERS:
        conversations = converted_records(
            path,
            form,
            "sft",
            lang=lang,
            top_k=top_k,
            html=html,
            skip_broken=skip_broken,
            ignored=ignored,
            rejected=rejected,
            mended=mended,
        )
        return WRITERS[to](conversations, rejected=rejected)
    if form == "oasst":
        languages = MessageFilter(languages=list(lang) or None)
        trees = oasst_trees.read_trees(path, languages, skip_broken=skip_broken, rejected=rejected)
        return chain.from_iterable(_of_tree(tree, to, top_k, max_replies, rejected) for tree in trees)
    if form == "hh":
        rankings = read_rankings(path, skip_broken=skip_broken, rejected=rejected, mended=mended, ignored=ignored)
        return _of_rankings(_in_languages(rankings, lang, rejected), to, max_replies)
    if to == "unpaired":
        replies = read_unpaired(path, skip_broken=skip_broken, rejected=rejected, mended=mended, ignored=ignored)
        return _in_languages(replies, lang, rejected)
    conversations = read_conversations(
        path, skip_broken=skip_broken, rejected=rejected, mended=mended, ignored=ignored, prompts=to == "prompts"
    )
    if form == "sharegpt" or html == "always":
        conversations = to_markdown(conversations, html, rejected=rejected, mended=mended)
    if form == "prompts":
        prompts = _in_languages(whole_prompts(conversations, rejected=rejected), lang, rejected)
        return ({"prompt": record["messages"], **_kept(record)} for record in prompts)
    conversations = mend_turns(conversations, keep_question=to == "prompts", rejected=rejected, mended=mended)
    return _of_conversations(_in_languages(conversations, lang, rejected), to)


def _check_conversion(form: Known, to: Target, top_k: int | None, max_replies: int | None, html: Html) -> None:
    """Raise ValueError if a format cannot be converted to the target, or an option does not apply."""
    compares = to in ("rankings", "preferences")
    if form not in ("oasst", "hh") and compares:
        raise ValueError(
            f"got conversations to convert to {to}, expected sft, prompts or unpaired, since they compare no replies: "
            "choose another target"
        )
    if form == "prompts" and to != "prompts":
        raise ValueError(
            f"got prompts to convert to {to}, expected prompts, since they have no replies: choose that target"
        )
    if top_k is not None and form != "oasst":
        raise ValueError(
            f"got top_k={top_k} for the form {form}, expected none, since only messages of "
            "Open-Assistant have ranks: drop it"
        )
    if max_replies is not None and (max_replies < 2 or not compares):
        raise ValueError(
            f"got max_replies={max_replies} for {to}, expected at least 2, for rankings or "
            "preferences only: raise or drop it"
        )
    if html == "always" and (form in ("oasst", "hh") or to == "unpaired"):
        raise ValueError(
            f"got html='always' for the form {form} to {to}, expected conversations, since only these are converted "
            "to Markdown: drop it"
        )


def _in_languages(records: Iterator[Record], lang: Sequence[str], rejected: Counter[str]) -> Iterator[Record]:
    return keep_languages(records, lang, rejected=rejected) if lang else records


@beartype
def prompt_rows(path: Path, *, rejected: Counter[str] | None = None) -> Iterator[Record]:
    """Yield the questions of a file of one of `ROWS` as `{"prompt": messages, "columns": {...}}`.

    The columns are all fields that are no part of the prompt, the answer among them. A record without a question is
    counted in `rejected`.
    """
    rejected = Counter() if rejected is None else rejected
    for _, record in read_records(path):
        question = {key: value for key, value in record.items() if key in PARTS_OF_A_QUESTION}
        try:
            conversations = [parse_conversation(question, prompts=True)]
        except ValueError as error:
            rejected[str(error)] += 1
            continue
        columns = {key: value for key, value in record.items() if key not in question}
        for conversation in whole_prompts(conversations, rejected=rejected):
            yield {"prompt": conversation["messages"], **_kept(conversation), "columns": columns}


def _of_tree(
    tree: OasstMessage, to: Target, top_k: int | None, max_replies: int | None, rejected: Counter[str]
) -> Iterator[Record]:
    if to == "sft":
        return oasst_trees.threads(tree, top_k)
    if to == "prompts":
        return oasst_trees.prompts(tree)
    return _of_rankings(oasst_trees.rankings(tree, top_k, max_replies=max_replies, rejected=rejected), to, None)


def _of_rankings(rankings: Iterable[Record], to: Target, max_replies: int | None) -> Iterator[Record]:
    for ranking in rankings:
        prompt, responses = ranking["prompt"], ranking["responses"][:max_replies]
        if to == "sft":
            yield {"messages": [*prompt, {"role": "assistant", "content": responses[0]}]}
        elif to == "prompts":
            yield {"prompt": prompt}
        elif to == "rankings":
            yield {"prompt": prompt, "responses": responses}
        elif to == "unpaired":
            yield from unpaired_of({"prompt": prompt, "responses": responses})
        else:
            yield from pairs_of({"prompt": prompt, "responses": responses})


def _kept(conversation: Record) -> Record:
    return {key: conversation[key] for key in KEPT if key in conversation}


def _of_conversations(conversations: Iterable[Record], to: Target) -> Iterator[Record]:
    for conversation in conversations:
        messages = conversation["messages"]
        if to == "sft":
            yield {"messages": messages, **_kept(conversation)}
        else:
            questions = (end for end, message in enumerate(messages, 1) if message["role"] == "user")
            yield from ({"prompt": messages[:end], **_kept(conversation)} for end in questions)
