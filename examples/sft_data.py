"""The default conversations of examples/sft.py: the English dialogues of chatterbot-corpus."""

from pathlib import Path
from typing import Any

from palm_rlhf.data.curation.cleaning import mend_turns


def dialogues() -> list[dict[str, Any]]:
    """Return each dialogue once, with alternating turns of the user and the assistant, each on one line."""
    try:
        import chatterbot_corpus
        import yaml
    except ImportError as error:
        raise ImportError(f"{error}; the dialogues come with: pip install palm-rlhf[examples]") from error
    paths = sorted((Path(chatterbot_corpus.__file__).parent / "data/english").glob("*.yml"))
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]
    conversations = [turns for file in files for turns in file["conversations"]]
    different = dict.fromkeys(tuple(" ".join(text.split()) for text in turns) for turns in conversations)
    roles = ("user", "assistant")
    records = (
        {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]}
        for turns in different
    )
    return list(mend_turns(records))
