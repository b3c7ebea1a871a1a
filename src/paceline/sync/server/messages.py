"""What workers, coordinator and shards of a parameter server say to each other.

Every message is a request that is answered, at once or later; who asks asks again until it is, so each may arrive
twice, late, or out of order. A worker is a replica; ``life`` counts its starts. A push is (worker, life, number);
numbers of a worker count from 1 and go on over its lives. A clock is a step of a worker, from 0.
"""

from typing import Any, NamedTuple


class Push(NamedTuple):
    """The name of one worker's gradient."""

    worker: int
    life: int
    number: int


class Term(NamedTuple):
    """A push in an update."""

    push: Push
    weight: float
    base: int
    """The version whose gradient it is."""


class Lease(NamedTuple):
    """Shares of a run that a worker learns from before its next push: ``first``, ``first + stride`` and so on.

    Each step has as many shares as there are workers: share s is part s modulo their number of step s // number + 1.
    """

    first: int
    stride: int
    length: int


# The order of things, made by the coordinator and followed by every shard. Each entry has the next number.


class Begun(NamedTuple):
    """A worker started (again): what earlier lives of it staged after push ``number`` was never committed."""

    worker: int
    life: int
    number: int


class Left(NamedTuple):
    """A worker is gone: the same for all lives up to ``life``; and it reads no more."""

    worker: int
    life: int
    number: int


class Update(NamedTuple):
    """The next version: one step of the optimizer with a weighted sum of gradients.

    ``rate``: the optimizer's rate as a share of its peak. ``measured``: shards report the squared norm of their part,
    and the step waits for ``Measured``. ``window``: of a pseudo-gradient, the sum of the weights of the window that it
    closes, and 0 while it stays open; None of a gradient.
    """

    version: int
    terms: tuple[Term, ...]
    rate: float
    measured: bool
    window: float | None = None


class Measured(NamedTuple):
    """The step of a measured update, its gradient times ``scale``."""

    version: int
    scale: float


class Dropped(NamedTuple):
    """A push that came too late: it is not applied."""

    push: Push


class Pin(NamedTuple):
    """A worker reads the version of now until its next pin: all shards keep it."""

    worker: int
    life: int


Entry = Begun | Left | Update | Measured | Dropped | Pin


# To the coordinator.


class Join(NamedTuple):
    """A worker started. ``life`` is greater than that of all its starts before; a retry has the same."""

    worker: int
    life: int


class Commit(NamedTuple):
    """All parts of a push are with the shards: it may be applied. ``targets`` = 0: it has no gradient.

    ``stop``: this worker was asked to end the run. ``seconds``: how long the steps of its lease took.
    """

    push: Push
    clock: int
    targets: float
    rate: float
    stop: bool = False
    seconds: float = 0.0


class Turn(NamedTuple):
    """May this worker begin ``clock``, and from which version?

    ``meet``: wait for all, and read what they read. Workers may meet several times at a clock: 1 for the first time.
    ``until``: of workers that take leases, where all meet next: after so many steps of the run.
    """

    worker: int
    life: int
    clock: int
    meet: int = 0
    until: int = 0


class Leave(NamedTuple):
    """A worker has ended, or is taken for dead."""

    worker: int
    life: int


class Fetch(NamedTuple):
    """A shard wants the entries after ``after``; those up to ``kept`` it will never want again.

    ``measured``: the version whose update is measured, and the squared norm of its part of the gradient.
    """

    shard: int
    after: int
    kept: int
    measured: tuple[int, float] | None = None


# To a shard.


class Stage(NamedTuple):
    """One rank's part of a push."""

    push: Push
    rank: int
    payload: Any


class Pull(NamedTuple):
    """One rank's part of the version that the worker has pinned by ``entry``."""

    worker: int
    life: int
    rank: int
    entry: int
    version: int
    payload: Any = None


# Answers.


class Joined(NamedTuple):
    """``number`` of the last push committed; the worker goes on with ``clock``."""

    number: int
    clock: int


class Committed(NamedTuple):
    """The push will be applied, or was too late and is not."""

    number: int
    kept: bool


class Granted(NamedTuple):
    """Begin ``clock`` from ``version``.

    ``clock`` may be later than asked for, for a worker that others did not wait for. ``floor``: all pushes of clocks
    before it are in. ``entry``: that of the pin. ``staleness``: of the last push of this worker that was applied,
    in versions. ``norm``: of the gradient of the newest version that was measured. ``stop``: the clock before which the
    run ends, if one worker was asked to end it.

    Of workers that take leases: ``lease`` is what to learn from, or None where all have met after ``reached`` steps of
    the run; ``pace`` the speed of all workers, in that of this one.
    """

    clock: int
    version: int
    entry: int
    floor: int
    staleness: int
    norm: float
    stop: int | None
    lease: Lease | None = None
    reached: int = 0
    pace: float = 1.0


class Entries(NamedTuple):
    """The entries from number ``first`` on."""

    first: int
    entries: tuple[Entry, ...]


class Done(NamedTuple):
    """It is so; ``payload`` is what was asked for."""

    payload: Any = None


class Values(NamedTuple):
    """A part of a version."""

    version: int
    payload: Any


class Refused(NamedTuple):
    """It cannot be so; ``reason`` says why. ``join``: the worker was given up, and may join again with a new life."""

    reason: str
    join: bool = False


# Around a run: to every server, while no worker is at work.


class Setup(NamedTuple):
    """Begin anew, with nothing of what was before. ``options`` says what all servers are told."""

    life: int
    options: Any


class Fill(NamedTuple):
    """Set a part of the parameters (``key`` None), or of what the optimizer keeps by a key."""

    key: str | None
    payload: Any


class Ready(NamedTuple):
    """All is filled; ``scalars`` are what the optimizer keeps of each parameter that is one number."""

    scalars: Any


class Ask(NamedTuple):
    """What the optimizer keeps by which keys, and how stale pushes were."""


# Of a federated run whose clients are processes of their own (``sync.remote``), to the server. Keys and sealed words
# are hexadecimal; places are those among the clients asked in the round, in the order of their numbers.


class Hello(NamedTuple):
    """The first message of a connection. ``run``: what has to be the same at both ends, as words by key.

    ``rows``: that the client has to learn from.
    """

    name: str
    token: str
    run: dict[str, str]
    rows: int


class Next(NamedTuple):
    """What is there to do after round ``after``, the last that this client handed something in for?"""

    after: int


class Advertise(NamedTuple):
    """Public keys of a round: those behind masks, and those that seal."""

    round: int
    masks: str
    seals: str


class Share(NamedTuple):
    """Sealed shares of this client's secrets, by the place of who gets them."""

    round: int
    sealed: dict[int, str]


class HandIn(NamedTuple):
    """What a client has learned. ``update``: tensors by name. ``numbers``: targets, the sums of losses and of their
    targets, the first loss, whether the update was within the clip."""

    round: int
    numbers: tuple[float, ...]
    update: Any


class Came(NamedTuple):
    """Whose vectors are in the sum?"""

    round: int


class Open(NamedTuple):
    """Shares of others' secrets, by place: of the masks of those who came, and of the keys of those who did not."""

    round: int
    masks: dict[int, str]
    keys: dict[int, str]


# Its answers.


class Welcome(NamedTuple):
    """The token is right, and so is the run; of so many clients."""

    clients: int


class Work(NamedTuple):
    """A client's part in a round.

    ``visit``: the fields of ``data.rounds.Visit``. ``rate``: of the optimizer, as a share of its peak. ``clip``: of
    privacy. ``place``: among ``asked``. ``weights``: tensors by name.
    """

    round: int
    visit: tuple[int, ...]
    rate: float
    clip: float | None
    place: int
    asked: int
    weights: Any


class Keys(NamedTuple):
    """Public keys by place."""

    keys: dict[int, tuple[str, str]]


class Shares(NamedTuple):
    """Sealed shares of others' secrets, by the place of who sent them."""

    sealed: dict[int, str]


class End(NamedTuple):
    """The run is over; its weights by name."""

    weights: Any


Request = Join | Commit | Turn | Leave | Fetch | Stage | Pull | Setup | Fill | Ready | Ask
Answer = Joined | Committed | Granted | Entries | Done | Values | Refused


KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Push, Term, Lease, Begun, Left, Update, Measured, Dropped, Pin),
        *(Join, Commit, Turn, Leave, Fetch, Stage, Pull),
        *(Setup, Fill, Ready, Ask),
        *(Joined, Committed, Granted, Entries, Done, Values, Refused),
        *(Hello, Next, Advertise, Share, HandIn, Came, Open),
        *(Welcome, Work, Keys, Shares, End),
    )
}


def plain(message: Any) -> Any:
    """A message as lists and plain values, for JSON; payloads must be such already."""
    if isinstance(message, tuple):
        name = type(message).__name__
        return [name if name in KINDS else "", *map(plain, message)]
    return message


def read(values: Any) -> Any:
    """The message of its ``plain`` form."""
    if isinstance(values, list):
        name, *fields = values
        return KINDS[name](*map(read, fields)) if name else tuple(map(read, fields))
    return values
