"""What an idempotent endpoint promises: one payment for each intent, and in the end a true answer to everybody."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from distsys.lab.explore.blocking import in_greenlet
from distsys.lab.explore.build import WrongShape, build, method_of
from distsys.lab.explore.loop import Process, running_process
from distsys.lab.explore.network import Network, Step
from distsys.lab.explore.run import BOTH, ExploredRun, Outcome, Scene, Worker
from distsys.lab.explore.worlds import WORLDS

LONG = 1.0  # seconds: who is held up for longer may have lost a lease without knowing it
RETRIES = (0.5, 2.5, 60.0, 600.0, 3000.0)  # seconds between the attempts of a client that was not told yet


class Declined(Exception):
    """The card was declined: nothing was charged."""


@dataclass(frozen=True, eq=False)  # by identity: hash() is another one in each process
class Request:
    """What a client asks for. The same user and key are the same intent."""

    user: str = "ann"
    key: str = "order-1"
    amount: int = 10

    def __str__(self) -> str:
        return f"{self.key}: {self.amount} from {self.user}"


ANN, BOB, MORE, NEXT = Request(), Request(user="bob"), Request(amount=20), Request(key="order-2")
Plan = tuple[tuple[str, float, Request], ...]
"""Who asks when for what: (worker, seconds, request)."""

IN_TURN: Plan = (("w1", 0.0, ANN), ("w2", 0.2, ANN), ("w2", 0.4, BOB), ("w3", 0.6, NEXT), ("w1", 0.8, ANN))
OTHER_AMOUNT: Plan = (("w1", 0.0, ANN), ("w2", 0.2, MORE), ("w3", 0.4, ANN))
AGAIN: Plan = (("w1", 0.0, ANN), ("w2", 0.2, ANN), ("w3", 0.4, ANN))
AT_ONCE: Plan = (("w1", 0.0, ANN), ("w2", 0.0, ANN), ("w3", 0.0, ANN), ("w3", 0.1, BOB))

_request: ContextVar[Request] = ContextVar("distsys_explored_request")


@dataclass
class Effect:
    """One payment that took effect."""

    request: str
    amount: int
    receipt: str
    excused: bool = False  # outside of every transaction, by a worker that had been held up longer than a short lease


class Charge(Step):
    """A charge on its way to the provider."""

    def __init__(self, provider: Provider, amount: int) -> None:
        super().__init__(provider.process, cast(Any, provider), b"")
        self.amount, self.request = amount, _request.get()
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def signature(self) -> tuple[bytes, ...]:
        """All charges are alike."""
        return (b"charge",)

    def __str__(self) -> str:
        return f"charge {self.amount}"


class Provider:
    """The way of one process to the provider that takes the money. The network knows it as a pipe."""

    def __init__(self, network: Network, process: Process, take: Callable[[Charge], Any]) -> None:
        self.network, self.process, self.take = network, process, take
        self.closed = self.silent = False
        self.unsent = self.expected = 0
        self.socket = None
        self.withheld: list[tuple[Charge, Any]] = []
        self.asked: list[Charge] = []
        network.pipes.add(cast(Any, self))

    async def charge(self, amount: int) -> Any:
        """Ask for the money, and return the receipt."""
        step = Charge(self, amount)
        self.asked.append(step)
        self.network.send(step)
        return await step.answer

    def execute(self, step: Charge) -> None:
        """Take the money."""
        self.unsent -= 1
        answer = self.take(step)
        if self.silent:
            self.withheld.append((step, answer))
        else:
            self._give(step, answer)

    def _give(self, step: Charge, answer: Any) -> None:
        if not step.answer.done():
            if isinstance(answer, Exception):
                step.answer.set_exception(answer)
            else:
                step.answer.set_result(answer)

    def receive(self, *, block: bool) -> None:
        """Do nothing: every answer comes at once."""

    def speak(self) -> None:
        """End of a silence: the client is given what was withheld."""
        self.silent = False
        withheld, self.withheld = self.withheld, []
        for step, answer in withheld:
            self._give(step, answer)

    def close(self) -> None:
        """Close the client's end."""
        self.closed = True
        self.network.pipes.discard(cast(Any, self))

    def reset(self) -> None:
        """Break what is under way. The next charge opens another connection."""
        for step in self.asked:
            self._give(step, TimeoutError("the provider did not answer"))
        self.asked.clear()


@dataclass(eq=False)
class EndpointRun(ExploredRun):
    """Three servers of one endpoint, and clients that ask as planned, and again until they are told.

    refusals  what the provider answers first, before it takes money
    """

    plan: Plan = IN_TURN
    refusals: tuple[Exception, ...] = ()
    at_once: bool = False  # every attempt of the plan has to be answered when it is made
    learned: dict[str, bool] = field(default_factory=dict)  # what earlier runs found out: "outside", of charges
    span: float = 1.0
    starved_spans: float = 3.0 * 3600

    def __post_init__(self) -> None:
        self.effects: list[Effect] = []
        self.told: dict[Request, list[tuple[str, str]]] = {}  # by request: (worker, answer)
        self.errors: list[str] = []
        self.receipts = 0
        self.left = list(self.refusals)

    def build(self, candidate: Any, **clients: Any) -> Any:
        """Call the candidate with what its parameters name of the clients and charge."""
        process = running_process.get()
        assert process is not None
        provider = Provider(self.network, process, self._take)

        async def charge(amount: int, conn: Any = None) -> str:
            if conn is None:
                return str(await provider.charge(amount))
            if self.left:
                raise self.left.pop(0)
            receipt = self._receipt(amount)
            insert = "INSERT INTO explored.ledger_of_the_lab VALUES (%s, %s, %s)"
            await conn.execute(insert, (str(_request.get()), amount, receipt))
            return receipt

        return build(candidate, **clients, charge=charge, name="explored")

    def _receipt(self, amount: int) -> str:
        self.receipts += 1
        return f"receipt {self.receipts} for {amount} from {_request.get().user}"

    def _take(self, step: Charge) -> Any:
        if self.left:
            return self.left.pop(0)
        worker = self._worker_of(step.process)
        self.receipts += 1
        receipt = f"receipt {self.receipts} for {step.amount} from {step.request.user}"
        self.learned["outside"] = True
        self.effects.append(Effect(str(step.request), step.amount, receipt, worker.delay > LONG))
        self.tell(worker, f"took effect: {receipt}")
        self.end(self.begin(worker, "apply", str(step.request)), "ok")
        return receipt

    async def work(self, worker: Worker, made: Any) -> None:
        """Make the attempts that the plan has for this worker, then those of clients that were not told."""
        pay = method_of(made, "pay", "__call__", "handle", "execute")
        if pay is None:
            raise WrongShape(f"{type(made).__name__} is no endpoint: it needs pay(key, amount, user)")
        try:
            inspect.signature(pay).bind("key", 1, "user")
        except TypeError as wrong:
            raise WrongShape(f"pay{inspect.signature(pay)} is called as pay(key, amount, user): {wrong}") from None
        for _, at, request in (part for part in self.plan if part[0] == worker.name):
            worker.phase = "idle"
            await asyncio.sleep(max(0.0, at * self.span - self.loop.now))
            await self._attempt(worker, pay, request)
        worker.phase = "idle"
        await asyncio.sleep(max(0.0, (self.plan[-1][1] + 0.1 * int(worker.name[1:])) * self.span - self.loop.now))
        requests = [*dict.fromkeys(request for *_, request in self.plan if request is not MORE)]
        for wait in RETRIES:
            await self.leap(wait)
            for request in requests:
                if request not in self.told or wait == RETRIES[-1]:
                    await self._attempt(worker, pay, request)
        worker.phase = "done"

    async def _attempt(self, worker: Worker, pay: Any, request: Request) -> None:
        _request.set(request)
        worker.phase = "asking"
        asked = self.begin(worker, "request", str(request))
        self.tell(worker, f"is asked for {request}")
        try:
            answer = await in_greenlet(pay, request.key, request.amount, request.user)
            answer = await answer if inspect.isawaitable(answer) else answer
        except Exception as error:  # noqa: BLE001  the client is not told
            said = f"{type(error).__name__}: {error}"
            if not self._over.done():
                self.errors.append(said)
            self.end(asked, "info", said)
            self.tell(worker, f"did not answer: {said[:60]}")
            worker.phase = "idle"
            return
        worker.phase = "idle"
        text = answer.decode(errors="replace") if isinstance(answer, bytes) else str(answer)
        self.end(asked, "ok")
        self.end(self.begin(worker, "told", f"{request} → {text}"), "ok")
        self.tell(worker, f"answered: {text[:60]}")
        self.told.setdefault(request, []).append((worker.name, text))
        self.progressed(worker)

    # ---- what is promised

    async def over(self) -> None:
        """Read the ledger, which is in the same database as what the candidate keeps."""
        if self.postgres:
            rows = self.postgres.rows("SELECT request, amount, receipt FROM explored.ledger_of_the_lab")
            self.effects += [Effect(*row) for row in rows]

    def starved(self) -> Outcome:
        """Judge what was seen; a request that hangs for ever was not answered."""
        if self.postgres:
            rows = self.postgres.rows("SELECT request, amount, receipt FROM explored.ledger_of_the_lab")
            self.effects += [Effect(*row) for row in rows]
        return self.ended()

    def ended(self) -> Outcome:
        """Compare what was told with what was paid."""
        if not (self.told or self.effects or self.schedule or self.refusals):
            return self.outcome(
                "INCONCLUSIVE", f"nobody was answered: {(self.crashes() or self.errors or ['no reason given'])[0]}"
            )
        for request in dict.fromkeys(request for *_, request in self.plan):
            if broken := self._broken(request):
                ops = tuple(op for op in self.ops if op.value and str(op.value).startswith(str(request)))
                return self.outcome("VIOLATED", broken, *ops[-4:])
        return self.outcome("HELD", f"{len(self.effects)} paid, each once")

    def _broken(self, request: Request) -> str:
        """Return which promise to this client was broken; "" if none was."""
        paid = [effect for effect in self.effects if effect.request == str(request)]
        told = self.told.get(request, [])
        sure = [effect for effect in paid if not effect.excused]
        if request is MORE:
            if told:
                return f"the key came back with another amount, {request}, and was answered: {told[0][1]}"
            return f"the key came back with another amount, {request}, and was charged" if paid else ""
        if len(sure) > 1 or (len(paid) > 1 and len(sure) == len(paid)):
            return f"{request.user} paid {len(paid)} times for {request.key}"
        if wrong := [effect for effect in paid if effect.amount != request.amount]:
            return f"{request.user} was to pay {request.amount} for {request.key}, and paid {wrong[0].amount}"
        if told and not paid:
            return f"{told[0][0]} answered {request}: {told[0][1]}. Nothing was ever charged"
        receipts = [effect.receipt for effect in paid]
        for name, answer in told:
            if not any(receipt in answer for receipt in receipts):
                return f"{name} answered {request} with {answer!r}; what was charged has {receipts[0]!r}"
        if len({answer for _, answer in told}) > 1 and len(paid) == 1:
            return f"{request} was answered in two ways: {' and '.join(sorted({answer for _, answer in told}))}"
        if not told and not self._may_be_unknown():
            return f"{request} was never answered, in more than an hour: {(self.errors or ['it hangs'])[-1]}"
        if self.at_once and len(told) < sum(part[2] == request for part in self.plan):
            return f"an attempt at {request} was not answered, though nothing was disturbed: {(self.errors or [''])[0]}"
        return ""

    def _may_be_unknown(self) -> bool:
        """Return whether a client may go without an answer: a server was disturbed, and charges are outside.

        Nobody can know then whether the provider has taken the money, so "in progress" may be the answer for ever. A
        charge in the database is there, or it is not.
        """
        return any(worker.disturbed for worker in self.workers) and self.learned.get("outside", False)


UNREACHABLE = ConnectionRefusedError(111, "the provider can't be reached: nothing was charged")
DISTURBED: dict[str, Any] = {"plan": (("w1", 0.0, ANN), ("w2", 0.3, ANN))}
ENDPOINT_SCENES = (
    Scene("one attempt after the other, two users, two keys", worlds=WORLDS, options={"plan": IN_TURN, "at_once": True},
          hint="What of the first attempt is remembered, under which name, and does the second one look there?"),
    Scene("the key comes back with another amount", options={"plan": OTHER_AMOUNT},
          hint="What has to be kept beside the answer, to be compared?"),
    Scene("the card is declined, and then it is not", options={"plan": AGAIN, "refusals": (Declined("declined"),)},
          hint="What is left under the key when the payment failed?"),
    Scene("the provider can't be reached, and then it can", options={"plan": AGAIN, "refusals": (UNREACHABLE,)},
          hint="What is left under the key when nothing was charged?"),
    Scene("two attempts at once, one of them late", (("hold", False), ("late", False)), worlds=(WORLDS[0], WORLDS[2]),
          options={"plan": AT_ONCE},
          hint="Between your look and your mark another one looks. Which one command or statement does both?"),
    Scene("a server is killed", tuple(("kill", after) for after in BOTH), options=DISTURBED,
          hint="What would make effect and mark happen together, or not at all? Who may take over, and when?"),
    Scene("a server stands still until another has answered", tuple(("freeze", after) for after in BOTH),
          options=DISTURBED, hint="It wakes up and goes on. What does it find changed?"),
    Scene("a connection breaks", (("reset", False), ("lost", True), ("cut", True)), options=DISTURBED,
          hint="A reply that is lost is not a command that is lost."),
    Scene("the client goes away", tuple(("cancel", after) for after in BOTH), options=DISTURBED,
          hint="A task can end between any two commands, without an Exception."),
)  # fmt: skip
