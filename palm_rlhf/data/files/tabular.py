"""Tables of records: CSV and TSV, in which every cell is text, and parquet."""

import ast
import csv
import datetime
import decimal
import io
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from palm_rlhf.data.extra_packages import missing_extra
from palm_rlhf.data.files.json_record import GZIP_ERRORS, BrokenRecord, Record, damaged_gzip, too_long
from palm_rlhf.model.files import HOW_TO_CONVERT, is_utf16

PARQUET_MAGIC = b"PAR1"
DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}
BATCH = 1000  # rows
# The columns of CSV that hold lists, numbers or flags, by their names. The cells of all others are text, also "42".
LISTS = frozenset(
    "conversations conversation items messages history responses ranking rankings ranks scores answers "
    "completions tools functions choices turns replies labels emojis score references reference".split()
)
NUMBERS = frozenset(("rank", "preference", "score", "rating", "weight", "turn", "index", "margin"))
FLAGS = frozenset(("deleted", "synthetic", "review_result"))
ROLE_KEYS, CONTENT_KEYS = {"role", "from"}, {"content", "value", "text", "tool_calls"}
JSON_COLUMNS = ("tools",)  # objects of any shape, for which parquet has no type


def is_csv(name: str) -> bool:
    """Return whether the name of a file says that it is CSV or TSV, packed with gzip or not."""
    return name.lower().removesuffix(".gz").endswith(tuple(DELIMITERS))


def read_csv(stream: Any, name: str, limit: int) -> Iterator[tuple[int, Record | BrokenRecord]]:
    """Yield each row as a record, or why it is broken, with the line on which it starts; empty cells are None.

    The first row names the columns. Cells hold text, except in columns whose names say that they hold lists, numbers or
    flags. Messages are read from any column. Lists and objects are JSON, or in the form that Python prints.
    """
    try:
        start = stream.peek(1 << 16)
    except GZIP_ERRORS as error:
        yield 1, damaged_gzip(error)
        return
    if is_utf16(start[:4]):
        yield 1, BrokenRecord("no UTF-8", HOW_TO_CONVERT)
        return
    header = start.splitlines()[0].decode("utf-8-sig", "replace") if start else ""
    suffix = name.lower().removesuffix(".gz")[-4:]
    delimiter = max(DELIMITERS[suffix], key=header.count)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    allowed = csv.field_size_limit(limit)
    try:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        columns: list[str] | None = None
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                is_long = "field limit" in str(error)
                yield line, too_long(limit) if is_long else BrokenRecord("broken CSV", error)
                continue
            except GZIP_ERRORS as error:
                yield line, damaged_gzip(error)
                return
            if columns is None:
                columns = _columns(row, name)
            elif row:
                yield line, _row(columns, row)
    finally:
        csv.field_size_limit(allowed)
        text.detach()


def _columns(row: list[str], name: str) -> list[str]:
    columns = ["index" if place == 0 and not name else name.strip() for place, name in enumerate(row)]
    if not all(columns) or len(set(columns)) < len(columns):
        raise ValueError(
            f"{name}: got the columns {columns[:8]}, expected a different name for each: mend the first row"
        )
    return columns


def _row(columns: list[str], row: list[str]) -> Record | BrokenRecord:
    if len(row) != len(columns):
        return BrokenRecord("broken CSV", f"got {len(row)} cells, expected {len(columns)}")
    try:
        "".join(row).encode()
    except UnicodeEncodeError as error:
        return BrokenRecord("invalid UTF-8", f"byte {ord(''.join(row)[error.start]) & 0xFF:#04x}")
    return {name: cell_value(name, cell) for name, cell in zip(columns, row)}


def cell_value(name: str, cell: str) -> Any:
    """Return the value of a cell of CSV: its text, or the list, number, flag or messages that its column holds."""
    if not cell:
        return None
    if name in NUMBERS or name in FLAGS:
        lowered = cell.strip().lower()
        if name in FLAGS and lowered in ("true", "false"):
            return lowered == "true"
        try:
            number = float(lowered)
            return int(number) if number.is_integer() and "." not in lowered else number
        except (ValueError, OverflowError):
            pass
    if cell.lstrip()[:1] in ("[", "{"):
        value = _parsed(cell)
        if isinstance(value, list | dict) and (name in LISTS or _is_messages(value)):
            return value
    return cell


def _parsed(cell: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
        return value if repr(value) == cell.strip() else None  # numpy prints arrays without commas: Python joins them


def _is_messages(value: Any) -> bool:
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(isinstance(t, dict) and ROLE_KEYS & t.keys() and CONTENT_KEYS & t.keys() for t in turns)


def write_csv(stream: Any, records: Iterable[Record], name: str) -> int:
    """Write records as rows and return their number; each key is a column, and lists and objects are JSON.

    Raises ValueError if a text would be read back as another value.
    """
    with _Spool(records) as spool:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
        rows = csv.writer(text, delimiter=DELIMITERS[name.lower().removesuffix(".gz")[-4:]][0], lineterminator="\n")
        if spool.columns:
            rows.writerow(spool.columns)
        for record in spool:
            rows.writerow([_cell(column, record.get(column)) for column in spool.columns])
        text.detach()
        return spool.num_records


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        if value and cell_value(name, value) != value:
            raise ValueError(
                f"got the text {value[:60]!r} under {name!r}, expected a text that CSV reads back as text: write "
                ".jsonl or .parquet"
            )
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def read_parquet(stream: Any, name: str) -> Iterator[tuple[int, Record | BrokenRecord]]:
    """Yield each row as a record, or why it is broken, with its number; keys without a value are left out."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise missing_extra("Parquet", error) from error
    with tempfile.TemporaryFile() as copy:
        if not isinstance(stream, io.BufferedReader) or not stream.seekable():
            while chunk := stream.read(1 << 20):
                copy.write(chunk)
            stream = copy
        number = 0
        try:
            for batch in ParquetFile(stream).iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        yield number, {name: _plain(value) for name, value in row.items()}
                    except TypeError as error:
                        yield number, BrokenRecord("no text", error)
        except (ArrowException, OSError) as error:
            raise ValueError(
                f"{name} is not a whole parquet file: it ends early or is damaged ({error}); copy it again"
            ) from error


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # tables write NaN where there is no number
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"got {type(value).__name__} in a column, expected texts, numbers, lists and objects")


def write_parquet(stream: Any, records: Iterable[Record]) -> int:
    """Write records as rows and return their number.

    Raises ValueError if the values of a column have no common type.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise missing_extra("Parquet", error) from error
    with _Spool(records) as spool:
        try:
            tables = (pyarrow.Table.from_pylist(rows) for rows in spool.batches())
            schema = pyarrow.unify_schemas([table.schema for table in tables], promote_options="permissive")
            with ParquetWriter(stream, schema) as writer:
                for rows in spool.batches():
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"got records whose values have no common type ({error}), expected one type for "
                "each column: write .jsonl"
            ) from error
        return spool.num_records


def _typed(value: Any) -> Any:
    """Return a value for a column of parquet, which has no type for an object without entries: None replaces it."""
    if isinstance(value, dict):
        return {name: _typed(item) for name, item in value.items()} or None
    return [_typed(item) for item in value] if isinstance(value, list) else value


class _Spool:
    """Records on their way to a table: a temporary file keeps them until all of their columns are known."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.file: BinaryIO = tempfile.TemporaryFile()
        self.columns: dict[str, None] = {}
        self.num_records = 0
        try:
            for record in records:
                self.columns.update(dict.fromkeys(record))
                self.file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
                self.num_records += 1
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "_Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __iter__(self) -> Iterator[Record]:
        self.file.seek(0)
        return map(json.loads, self.file)

    def batches(self) -> Iterator[list[Record]]:
        """Yield the records in batches, each with every column; one empty batch if there are no records."""
        batch: list[Record] = []
        for record in self:
            row = {column: record.get(column) for column in self.columns}
            batch.append({name: json.dumps(v) if name in JSON_COLUMNS and v else _typed(v) for name, v in row.items()})
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch or not self.num_records:
            yield batch
