"""The work of a running batch, step by step: rows are filled, fed and freed here; who may join is decided elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from vilau.generation.interleaved import VisualKind
from vilau.generation.pace import Pace, Steering, clock_of, measured, weighed
from vilau.generation.position import Networks, VisualStep
from vilau.generation.prepared import AUTO_LIMIT, packable, packed_bytes, prepare
from vilau.generation.reading import Reader
from vilau.generation.requests import (
    InterleavedRequest,
    PictureEnd,
    PictureStart,
    SequenceEnd,
    TextRequest,
    TextToken,
    VisualPosition,
    VisualSequenceRequest,
    last_guided,
)
from vilau.generation.running import Answer, Cohort, Drawing, Job, Picture, Reading, Target, Text, TextSampling
from vilau.generation.sampling import row_seeds
from vilau.generation.slots import Row, SlotStore, StoreLanguage, plan

_KEPT_COHORTS = 4
_WORTH_PACKING = 32 << 20


class ServedModel(Protocol):
    """What a running batch needs of the joined network."""

    config: Any
    vision_tower: Any
    projector: Any
    language_model: Any
    depth_transformer: Any

    def get_input_embeddings(self) -> Any: ...

    def get_output_embeddings(self) -> Any: ...


class Engine:
    """Sequences that run together; for one thread.

    Args:
        model: the joined network.
        positions: of all rows together, for which there is memory.
        rows: at once, about; for the layout of the weights.
        text_pace, free_rows, prefill: see `Policy`.
        kernel: see `ContinuousBatch`.
        finished: called with a sequence that is complete and has left, and how it ended.
        failed: called with the request of a sequence that cannot go on, and why.
    """

    def __init__(
        self,
        model: ServedModel,
        positions: int,
        rows: int,
        text_pace: float,
        free_rows: float | None,
        prefill: int,
        kernel: str | None,
        finished: Callable[[Text | Picture, SequenceEnd], None],
        failed: Callable[[Job, BaseException], None],
    ) -> None:
        self.model, self.positions, self.prefill = model, positions, prefill
        self.finished, self.failed = finished, failed
        networks = _networks(model, rows, kernel)
        self.step_maker = VisualStep(networks)
        self.language = StoreLanguage(networks.language)
        self.reset()
        self.pace, self.steering = self._steered(text_pace, free_rows)

    def _steered(self, limit: float, free_rows: float | None) -> tuple[Pace, Steering | None]:
        """Return what the pieces of work cost, and what corrects it if it is measured; no limit needs neither."""
        networks, head = self.step_maker.networks, self.model.get_output_embeddings()
        if free_rows is None and limit < float("inf") and self.positions >= 64 * 16:
            pace = measured(networks, self.language, head, self._store, limit)
            return pace, Steering(pace, clock_of(self.device))
        return weighed(networks, head.weight.numel(), limit, free_rows or 16.0), None

    def reset(self) -> None:
        """Forget everything and give all memory back."""
        weight = self.model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self._store = SlotStore(self.model.config.text_config, weight.detach(), self.positions)
        self._texts: list[Text] = []
        self._pictures: deque[Picture] = deque()
        self._reader = Reader(self._store, self.model.config.hidden_size, self._place)
        self._cohorts: deque[Cohort] = deque(maxlen=_KEPT_COHORTS)
        self._drawing: Drawing | None = None
        self._written: list[Text] = []
        self._spent = 0.0  # cost of the depth steps since the last tokens
        self._sampling: TextSampling | None = None
        self._reading_first = False

    @property
    def taken(self) -> int:
        """Positions that memory is taken for, kept prompts included."""
        return self._store.positions + self._store.kept

    def join(self, job: Job) -> None:
        """Give a request its rows and begin to read its prompts."""
        request = job.handle.request
        seeds = row_seeds(request.seed, request.n, "cpu").tolist()
        for number, seed in enumerate(seeds):
            if isinstance(request, InterleavedRequest):  # its rows without the prompt come with its pictures
                (row,) = self._reader.reserve(job.each.capacities[:1])
                job.sequences.append(Answer(job, request, number, seed, row))
                continue
            row, *more = self._reader.reserve(job.each.capacities)
            if isinstance(request, TextRequest):
                job.sequences.append(Text(job, request, number, seed, row))
                continue
            empty = more[0] if more else None
            scales, options = request.scales(), request.sampling
            job.sequences.append(Picture(job, options, number, seed, scales, row, empty, self._sound()))
        self._reader.read(request.prompt, [Target(sequence, sequence.row, False) for sequence in job.sequences])
        empties = [
            Target(picture, picture.empty, True)
            for picture in job.sequences
            if isinstance(picture, Picture) and picture.empty is not None
        ]
        if empties:
            assert isinstance(request, VisualSequenceRequest) and request.unconditional is not None
            self._reader.read(request.unconditional, empties)

    def _sound(self) -> torch.Tensor:
        return torch.ones((), dtype=torch.bool, device=self.device)

    def _place(self, target: Target, state: torch.Tensor) -> None:
        sequence = target.sequence
        if not sequence.place(target.empty, state):
            return
        if isinstance(sequence, Text):
            self._texts.append(sequence)
            self._sampling = None
        else:
            self._pictures.append(sequence)

    def leave(self, sequence: Text | Picture) -> None:
        """Take a sequence out and free its rows; an answer with the picture that it draws."""
        if sequence.gone:
            return
        drawing = sequence.drawing if isinstance(sequence, Answer) else None
        self._reader.drop((sequence, drawing))
        rows = sequence.rows
        sequence.gone = True
        if isinstance(sequence, Text):
            self._texts = [text for text in self._texts if text is not sequence]
            self._sampling = None
        for picture in (sequence, drawing):
            if isinstance(picture, Picture):
                self._forget(picture)
        for row in rows:
            self._store.release(row)

    def _complete(self, sequence: Text | Picture, event: SequenceEnd) -> None:
        self.leave(sequence)
        self.finished(sequence, event)

    def turn(self) -> None:
        """One pass of the language model over what is due, then the text head and depth steps.

        What a text waits for between two tokens are the depth steps after the one and the pass with the other: both
        share the room that `pace` leaves.
        """
        texts = [text for text in self._texts if text.state is None]
        whole = self._room(len(texts))
        before, self._spent = (self._spent, 0.0) if texts else (0.0, 0.0)
        forced = before > whole
        room = whole - before
        drawing = bool(self._drawing or self._pictures)
        read_first = self._reader.busy and (self._reading_first or not drawing)
        self._reading_first = self._reader.busy and not read_first
        pieces = self._pieces(room, int(not before)) if read_first else []
        room -= self.pace.positions(sum(count for _, count in pieces))
        chosen: list[Picture] = []
        if self._drawing is None:
            chosen = self._choose(self._pictures, room, bool(texts), not read_first and not before)
            room -= self.pace.positions(sum(len(picture.rows) for picture in chosen if picture.state is None))
        if not read_first:
            pieces = self._pieces(room, 0)
        hidden, at = self._forward(texts, chosen, pieces)
        if self.steering is not None:
            fed = any(picture.state is None for picture in chosen)
            usual = texts == self._written
            self.steering.written(len(texts), bool(before or pieces or fed), forced or room < 0, usual)
        self._written = texts
        chosen = [picture for picture in chosen if not picture.gone]
        if self._drawing is None:
            chosen = self._with_read(chosen, whole)
            if chosen:
                cohort = self._cohort_of(chosen)
                self._drawing = Drawing(self.step_maker, cohort, self._states(cohort, hidden, at))
        if not texts or not self._reading_first:  # else what is left between the next two tokens is for prompts
            self._draw(whole)

    def _room(self, texts: int) -> float:
        """Return the work that may be done beside so many texts between two of their tokens."""
        return self.pace.room(texts) if self.steering is None else self.steering.room(texts)

    def _pieces(self, room: float, least: int) -> list[tuple[Reading, int]]:
        """Return how many positions of which prompts are read now, as many as there is room for."""
        return self._reader.pieces(max(least, self.pace.positions_in(room, self.prefill)))

    def _choose(self, pictures: Iterable[Picture], room: float, limited: bool, least_one: bool) -> list[Picture]:
        """Return the pictures whose next position begins now: all, or beside texts the first that there is room for."""
        if not limited:
            return list(pictures)
        chosen: list[Picture] = []
        whole = self._room(len(self._texts))
        new = rows = 0
        for picture in pictures:
            new += len(picture.rows) if picture.state is None else 0
            rows += len(picture.rows)
            crowded = self.pace.positions(new) > room or self.pace.depth_step(rows) > whole
            if crowded and (chosen or not least_one):
                break
            chosen.append(picture)
        return chosen

    def _with_read(self, chosen: list[Picture], whole: float) -> list[Picture]:
        """Return the pictures whose next position begins now with those that have just been read, if there is room."""
        rows = sum(len(picture.rows) for picture in chosen)
        joined = list(chosen)
        for picture in self._pictures:
            if picture.state is None or picture in chosen:
                continue
            rows += len(picture.rows)
            if self.pace.depth_step(rows) > whole:
                break
            joined.append(picture)
        return joined

    def _forward(
        self, texts: Sequence[Text], chosen: Sequence[Picture], pieces: Sequence[tuple[Reading, int]]
    ) -> tuple[torch.Tensor, dict[int, int]]:
        """Feed tokens, codes and pieces of prompts; draw tokens, and make ready what has been read.

        Returns the states ``(N, H)`` and where those of each row, by its id, stand in them.
        """
        fed = [picture for picture in chosen if picture.state is None]
        at: dict[int, int] = {}
        hidden = self._store.like.new_zeros((0, self.model.config.hidden_size))
        if texts or fed or pieces:
            steps = [text.row for text in texts] + [row for picture in fed for row in picture.rows]
            work, ordered = plan(steps, [(reading.row, count) for reading, count in pieces], self._store.like)
            hidden = self.language.forward(self._embeds(texts, fed, ordered, pieces), work)
            at = {id(row): number for number, row in enumerate(ordered)}
            for row in ordered:
                row.length += 1
            self._reader.finish(pieces, hidden, len(ordered))
        fresh = [text for text in self._texts if text.state is not None]
        if texts or fresh:
            own = hidden[[at[id(text.row)] for text in texts]]
            states = [text.state for text in fresh if text.state is not None]
            self._write([*texts, *fresh], torch.cat([own, torch.stack(states)]) if states else own)
        return hidden, at

    def _embeds(
        self,
        texts: Sequence[Text],
        fed: Sequence[Picture],
        ordered: Sequence[Row],
        pieces: Sequence[tuple[Reading, int]],
    ) -> torch.Tensor:
        """Return what is fed ``(N, H)``, in the order of the pass."""
        sources: list[torch.Tensor] = []
        place: dict[int, int] = {}
        if texts:
            sources.append(self._token_embeds([text.token for text in texts]))
            place = {id(text.row): number for number, text in enumerate(texts)}
        if fed:
            cohort = self._kept_cohort(fed)
            codes = [picture.codes for picture in fed if picture.codes is not None] if cohort is None else []
            sources.append(self._code_embeds(torch.stack(codes) if cohort is None else cohort.state.codes))
            for number, picture in enumerate(fed, len(texts)):
                place |= {id(row): number for row in picture.rows}
        found = []
        if sources:
            order = torch.tensor([place[id(row)] for row in ordered]).to(self.device, non_blocking=True)
            found = [torch.cat(sources).index_select(0, order)]
        found += [reading.next(count) for reading, count in pieces]
        return torch.cat(found)

    def _kept_cohort(self, pictures: Sequence[Picture]) -> Cohort | None:
        return next((cohort for cohort in self._cohorts if cohort.serves(pictures)), None)

    def _cohort_of(self, pictures: Sequence[Picture]) -> Cohort:
        """Return the state of these pictures' position: kept, since beside texts groups take turns, or made."""
        cohort = self._kept_cohort(pictures)
        if cohort is None:
            cohort = Cohort(self.step_maker.networks, pictures, self.device)
            self._cohorts.appendleft(cohort)
        return cohort

    def _forget(self, picture: Picture) -> None:
        """Let go of what is kept for a picture that is done."""
        picture.gone = True
        if picture in self._pictures:
            self._pictures.remove(picture)
        for cohort in [cohort for cohort in self._cohorts if picture in cohort.pictures]:
            self._cohorts.remove(cohort)

    def _states(self, cohort: Cohort, hidden: torch.Tensor, at: dict[int, int]) -> torch.Tensor:
        """Return the states ``(R, H)`` of a cohort's rows: read just now, or from the end of their prompts."""
        pictures = cohort.pictures
        empties = [pictures[number] for number in cohort.guided]
        if all(picture.state is None for picture in pictures):
            rows = [p.row for p in pictures] + [p.empty for p in empties if p.empty is not None]
            return hidden[[at[id(row)] for row in rows]]
        own = [hidden[at[id(p.row)]] if p.state is None else p.state for p in pictures]
        own += [hidden[at[id(p.empty)]] if p.empty_state is None else p.empty_state for p in empties]
        for picture in pictures:
            picture.state = picture.empty_state = None
        return torch.stack(own)

    def _write(self, texts: list[Text], hidden: torch.Tensor) -> None:
        """Draw one token of each text from states ``(T, H)``: the one place where the host waits for the device."""
        if self._sampling is None or not self._sampling.serves(texts):
            self._sampling = TextSampling(texts, self.model.get_output_embeddings().weight.shape[0], self.device)
        logits = self.model.get_output_embeddings()(hidden).float()
        tokens = self._sampling.draw(logits)
        drawn = torch.stack([tokens, torch.isfinite(hidden).all(1).long()]).tolist()
        for text, token, sound in zip(texts, *drawn, strict=True):
            if not sound:
                self.failed(text.job, FloatingPointError("the model's states are not finite"))
            if text.gone:
                continue
            text.state, text.token = None, token
            text.done += 1
            if isinstance(text, Answer) and text.begun is not None:
                self._begin(text, text.begun)
                continue
            text.job.handle.emit(TextToken(text.number, token, text.done))
            if text.ending is not None:
                self._complete(text, SequenceEnd(text.number, text.ending))

    def _begin(self, answer: Answer, kind: VisualKind) -> None:
        """Let an answer that wrote a start token draw: the token is read, and the prompt without text beside it."""
        self._texts.remove(answer)
        self._sampling = None
        request, token = answer.mixed, answer.token
        positions = request.rules.positions[kind]
        answer.job.handle.emit(PictureStart(answer.number, answer.pictures, kind, positions))
        try:
            guided = bool(last_guided(request.scales(kind)))
            empty = self._reader.reserve(answer.job.each.capacities[1:])[0] if guided else None
            picture = answer.begin(kind, empty, self._sound())
            self._reader.go_on(Target(picture, answer.row, False), self._token_embeds([token]))
            if empty is not None:
                self._reader.read(request.unconditional[kind], [Target(picture, empty, True)])
        except Exception as error:
            self.failed(answer.job, error)

    def _end_picture(self, answer: Answer, picture: Picture) -> None:
        """Let an answer go on with text after a picture: its last codes and its end token are read."""
        self._forget(picture)
        if picture.empty is not None:
            self._store.release(picture.empty)
        answer.drawing = None
        answer.job.handle.emit(PictureEnd(answer.number, picture.index, picture.kind))
        if answer.ending is not None:
            self._complete(answer, SequenceEnd(answer.number, answer.ending))
            return
        assert picture.codes is not None
        end = self._token_embeds([answer.mixed.rules.ends[picture.kind]])
        embeds = torch.cat([self._code_embeds(picture.codes.unsqueeze(0)), end])
        self._reader.go_on(Target(answer, answer.row, False), embeds)

    def _token_embeds(self, tokens: list[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor(tokens).to(self.device, non_blocking=True))

    def _code_embeds(self, codes: torch.Tensor) -> torch.Tensor:
        networks = self.step_maker.networks
        return networks.projector(networks.quantizer.z_q(codes)).to(self.dtype)

    def _draw(self, room: float) -> None:
        """Make a depth step, and further ones as long as there is room."""
        drawing = self._drawing
        if drawing is None:
            return
        cost, limited = self.pace.depth_step(drawing.rows), room < float("inf")
        while not drawing.complete and (not self._spent or self._spent + cost <= room):
            drawing.advance()
            self._spent += cost if limited else 0.0
        if not drawing.complete:
            return
        self._drawing = None
        codes, sound = drawing.state.codes.clone().unbind(), drawing.cohort.sound.clone().unbind()
        drawn = drawing.cohort.pictures
        if len(drawn) < len(self._pictures):  # those that were not drawn come first
            self._pictures = deque(sorted(self._pictures, key=lambda picture: picture in drawn))
        for picture, own, finite in zip(drawn, codes, sound, strict=True):
            if not picture.gone:
                self._advance(picture, own, finite)

    def _advance(self, picture: Picture, codes: torch.Tensor, sound: torch.Tensor) -> None:
        """Note a picture's new codes, and let it leave with the last ones."""
        picture.codes, picture.sound = codes, sound
        picture.done += 1
        picture.job.handle.emit(VisualPosition(picture.number, codes, picture.done, picture.index))
        if picture.done == len(picture.scales):
            if not bool(sound):
                self.failed(picture.job, FloatingPointError("the model's states are not finite"))
            elif picture.answer is None:
                self._complete(picture, SequenceEnd(picture.number, "length"))
            else:
                self._end_picture(picture.answer, picture)
            return
        if picture.empty is not None and not picture.guided_still:
            empty, picture.empty = picture.empty, None
            self._store.release(empty)


def _networks(model: ServedModel, rows: int, kernel: str | None) -> Networks:
    """Return a model's networks; on a CPU their weights are laid out for any number of rows, where it is worth it."""
    if model.depth_transformer is None:
        return Networks.of(model)
    if kernel is None:
        worth = packable(model) is None and _WORTH_PACKING <= packed_bytes(model) <= AUTO_LIMIT
        kernel = "mkldnn" if worth else "plain"
    return prepare(model, rows, kernel)
