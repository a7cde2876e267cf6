"""--ppl: score texts and show the results in the way that was asked for."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import distributed
from tqdm import tqdm

from reformer_lm.errors import InputError
from reformer_lm.prediction import explanation, reports
from reformer_lm.prediction.comparison import comparison_lines, comparison_record
from reformer_lm.prediction.fluency_page import ALTERNATIVES as PAGE_ALTERNATIVES
from reformer_lm.prediction.fluency_page import FluencyPage
from reformer_lm.prediction.inputs import STDIN, FileOptions, given_texts
from reformer_lm.prediction.result_file import ResultFile, identify, sort_key
from reformer_lm.scoring import Score, ScoreTotals, check_options, score_distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class ScoringJob:
    """What --ppl does.

    Args:
        arguments: The command line.
        model: On its device.
        tokenizer: The model's.

    Raises:
        InputError: If an option does not fit the model.
    """

    def __init__(
        self, arguments: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self._arguments = arguments
        self._model = model
        self._tokenizer = tokenizer
        likeliest = [explanation.ALTERNATIVES] if arguments.explain or arguments.compare else [0]
        if arguments.html is not None:
            likeliest.append(PAGE_ALTERNATIVES)
        self._options = check_options(
            model, tokenizer, batch_size=arguments.batch_size, batch_tokens=arguments.batch_tokens,
            add_eos=arguments.add_eos, window=None, context=arguments.context, stride=arguments.stride,
            alternatives=max(likeliest),
        )  # fmt: skip
        self._colours = explanation.has_colours(sys.stdout)
        self._is_first = int(os.environ.get("RANK", "0")) == 0

    def turn(self, line: str) -> None:
        """Score one line."""
        self._show(self._scores(iter([line])))

    def compare(self) -> None:
        """Score the two texts of --compare and say where they differ."""
        first, second = self._scores(iter(self._arguments.compare))
        if self._arguments.json:
            print(reports.to_json(comparison_record(first, second)))
        else:
            print("\n".join(comparison_lines(first, second, self._colours)))

    def run(self) -> None:
        """Score all texts of the command line."""
        arguments = self._arguments
        options = FileOptions(arguments.field, arguments.column, arguments.encoding)
        total = None
        if arguments.file != STDIN:
            # Reading a file twice costs little beside scoring it, tells how much there is, and finds its faults first.
            total = sum(1 for _ in given_texts(arguments.text, arguments.file, options))
        texts = given_texts(arguments.text, arguments.file, options)
        page = None
        if arguments.html is not None:
            page = FluencyPage(self._tokenizer, self._settings())
        if arguments.output is not None:
            totals = self._to_file(texts, total, page)
        else:
            totals = self._show(self._with_progress(self._scores(texts), total, 0, page))
        if page is not None and self._is_first:
            page.write(arguments.html)
            self._note(f"{arguments.html}: the page")
        if totals.texts > 1 and self._is_first:
            self._note(reports.totals_line(totals))

    def _scores(self, texts: Iterator[str]) -> Iterator[Score]:
        return score_distributed(self._model, self._tokenizer, texts, self._options)

    def _with_progress(
        self, scores: Iterator[Score], total: int | None, done: int, page: FluencyPage | None
    ) -> Iterator[Score]:
        """Pass scores on to page and progress bar."""
        arguments = self._arguments
        # A bar among lines that appear on the same terminal would tear them apart.
        beside_lines = arguments.output is None and arguments.sort is None and sys.stdout.isatty()
        hidden = arguments.quiet or beside_lines or not self._is_first or not sys.stderr.isatty()
        with tqdm(total=total, initial=done, unit="text", desc="scoring", disable=hidden, smoothing=0.1) as bar:
            for score in scores:
                if page is not None:
                    page.add(score)
                yield score
                bar.update()

    def _show(self, scores: Iterator[Score]) -> ScoreTotals:
        """Print a line for each text that is wanted."""
        arguments = self._arguments
        totals = ScoreTotals()
        if arguments.explain and not (arguments.json or arguments.quiet):
            self._note(explanation.legend(self._colours))
        waiting: list[tuple[float, int, str]] = []
        shown = 0
        for score in scores:
            index = totals.texts
            totals.add(score)
            if not self._keep(score.ppl):
                continue
            shown += 1
            if arguments.sort is None:
                print(self._format(score, index), flush=True)
            else:
                waiting.append((sort_key(score.ppl, arguments.sort), index, self._format(score, index)))
        for _, _, line in sorted(waiting):
            print(line)
        self._note_threshold(shown, totals)
        return totals

    def _to_file(self, texts: Iterator[str], total: int | None, page: FluencyPage | None) -> ScoreTotals:
        """Write results to --output, going on with what an interrupted run has left."""
        arguments = self._arguments
        # What the page shows is not in the file: a run with a page begins anew. So does one that reads stdin.
        can_go_on = page is None and arguments.file != STDIN
        file = None
        done = 0
        if self._is_first:
            identity = identify(arguments.text, arguments.file, arguments.model_dir, self._settings())
            file = ResultFile(arguments.output, identity if can_go_on else None)
            done = file.taken_over
        done = _told_by_the_first(done)
        if done:
            self._note(f"{arguments.output}: going on after {done:,} texts")
        for score in self._with_progress(self._scores(islice(texts, done, None)), total, done, page):
            if file is not None:
                explained = explanation.explain(score, self._tokenizer) if arguments.explain else None
                file.write(score, explained)
        if file is None:
            return ScoreTotals()
        written = file.finish(self._keep, arguments.sort)
        self._note_threshold(written, file.totals)
        self._note(f"{arguments.output}: {written:,} results")
        return file.totals

    def _format(self, score: Score, index: int) -> str:
        arguments = self._arguments
        if arguments.json:
            record = reports.score_record(score, index)
            if arguments.explain:
                record["explanation"] = explanation.explain(score, self._tokenizer)
            return reports.to_json(record)
        if arguments.explain:
            return "\n".join(explanation.explanation_lines(score, self._tokenizer, self._colours))
        return reports.score_line(score)

    def _keep(self, perplexity: float) -> bool:
        threshold = self._arguments.threshold
        return threshold is None or (not math.isnan(perplexity) and perplexity > threshold) == self._arguments.invert

    def _note_threshold(self, shown: int, totals: ScoreTotals) -> None:
        if self._arguments.threshold is not None and self._is_first:
            side = "above" if self._arguments.invert else "of at most"
            self._note(f"{shown:,} of {totals.texts:,} texts have a PPL {side} {self._arguments.threshold:g}")

    def _settings(self) -> dict[str, Any]:
        options = self._options
        return {
            "model": str(self._arguments.model_dir),
            "number format": str(self._model.dtype).removeprefix("torch."),
            "window (tokens)": options.window,
            "context of a further window (tokens)": options.context,
            "end of article scored": options.add_eos,
            "field": self._arguments.field,
            "column": self._arguments.column,
            "encoding": self._arguments.encoding,
            "tokens explained": bool(self._arguments.explain),
        }

    def _note(self, line: str) -> None:
        if not self._arguments.quiet and self._is_first:
            print(line, file=sys.stderr)


def _told_by_the_first(value: int) -> int:
    """A value of process 0, in all processes."""
    if not distributed.is_initialized():
        return value
    told = [value]
    distributed.broadcast_object_list(told, src=0)
    return told[0]


def join_processes(file: str | None) -> Callable[[], None]:
    """Join the other processes of torchrun, if it started this one.

    Args:
        file: The value of --file.

    Returns:
        What to call at the end.

    Raises:
        InputError: If texts come from standard input, which only one process can read.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return lambda: None
    if file == STDIN:
        raise InputError("several processes cannot share stdin; write the texts into a file and give --file")
    distributed.init_process_group("gloo")
    return distributed.destroy_process_group
