//! What a power cut may leave of a device by the promises of virtio 1.2, 5.2.6: nothing of the code that keeps
//! them is in here.

/// A step of a workload; of those that change blocks, the first and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Write(u64, u64),
    /// And whether they may be given up.
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    /// The driver chooses write-through, while nothing is in flight.
    WriteThrough,
}

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// What no request has put there.
    Noise,
    /// As it was before.
    Initial,
    Zero,
    /// Of the request with this number.
    Stamp(usize),
}

/// What a sector may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// A discard says nothing.
    Anything,
    Only(Content),
}

impl Allowed {
    pub fn is(self, found: Content) -> bool {
        self == Self::Anything || self == Self::Only(found)
    }
}

impl Op {
    /// What it makes of a block; none: nothing.
    fn makes(self, id: usize, block: u64) -> Option<Allowed> {
        let (first, count, content) = match self {
            Self::Write(first, count) => (first, count, Allowed::Only(Content::Stamp(id))),
            Self::Zero(first, count, _) => (first, count, Allowed::Only(Content::Zero)),
            Self::Discard(first, count) => (first, count, Allowed::Anything),
            Self::Flush | Self::WriteThrough => return None,
        };
        (first..first + count).contains(&block).then_some(content)
    }
}

#[derive(Debug)]
struct Request {
    op: Op,
    submitted: u32,
    completed: Option<u32>,
    /// It is stable when it completes, and what was complete when it was submitted with it.
    flushes: bool,
}

impl Request {
    /// Whether it was over before the other was submitted.
    fn is_before(&self, other: &Self) -> bool {
        self.completed
            .is_some_and(|completed| completed < other.submitted)
    }
}

/// What was asked of a device and what it has said, in order.
#[derive(Debug)]
pub struct Model {
    now: u32,
    through: bool,
    requests: Vec<Request>,
}

impl Model {
    /// Before the first request; whether every write is stable when it completes.
    pub fn new(through: bool) -> Self {
        Self {
            now: 0,
            through,
            requests: Vec::new(),
        }
    }

    /// What happens next happens later.
    pub fn tick(&mut self) {
        self.now += 1;
    }

    /// A request is submitted: its number.
    pub fn submit(&mut self, op: Op) -> usize {
        let is_change = op == Op::WriteThrough;
        self.through |= is_change;
        self.requests.push(Request {
            op,
            submitted: self.now,
            completed: is_change.then_some(self.now),
            flushes: op == Op::Flush || (self.through && !is_change),
        });
        self.requests.len() - 1
    }

    /// A request is said to be done.
    pub fn complete(&mut self, id: usize) {
        let before = self.requests[id].completed.replace(self.now);
        assert_eq!(before, None, "request {id} ends twice");
    }

    /// Nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.requests
            .iter()
            .all(|request| request.completed.is_some())
    }

    fn is_stable(&self, request: &Request) -> bool {
        let is_flushed = |flush: &Request| {
            flush.flushes && flush.completed.is_some() && request.is_before(flush)
        };
        request.completed.is_some() && (request.flushes || self.requests.iter().any(is_flushed))
    }

    /// What a cut now may leave in a sector of a block: what any request has made of it, except those that were over
    /// before one was submitted that is stable.
    pub fn allowed(&self, block: u64) -> Vec<Allowed> {
        let mut all = Vec::new();
        for (id, request) in self.requests.iter().enumerate() {
            all.extend(request.op.makes(id, block).map(|made| (request, made)));
        }
        let stable: Vec<_> = all
            .iter()
            .filter(|(request, _)| self.is_stable(request))
            .collect();
        let is_over = |request: &Request| stable.iter().any(|(later, _)| request.is_before(later));
        let left = all.iter().filter(|(request, _)| !is_over(request));
        let mut allowed: Vec<_> = left.map(|(_, made)| *made).collect();
        if stable.is_empty() {
            allowed.push(Allowed::Only(Content::Initial));
        }
        allowed
    }
}

#[test]
fn the_model_itself() {
    let mut model = Model::new(false);
    let now = |model: &mut Model, op| {
        model.tick();
        model.submit(op)
    };
    let stamp = |id| Allowed::Only(Content::Stamp(id));
    let initial = Allowed::Only(Content::Initial);
    let first = now(&mut model, Op::Write(0, 1));
    assert_eq!(model.allowed(0), [stamp(first), initial], "in flight");
    assert_eq!(model.allowed(1), [initial]);
    let flush = now(&mut model, Op::Flush);
    model.complete(first);
    model.complete(flush);
    assert_eq!(
        model.allowed(0),
        [stamp(first), initial],
        "it was not complete before"
    );
    let flush = now(&mut model, Op::Flush);
    model.complete(flush);
    assert_eq!(model.allowed(0), [stamp(first)]);
    let discard = now(&mut model, Op::Discard(0, 2));
    model.complete(discard);
    assert_eq!(model.allowed(0), [stamp(first), Allowed::Anything]);
    now(&mut model, Op::WriteThrough);
    let zero = now(&mut model, Op::Zero(0, 1, true));
    model.complete(zero);
    assert_eq!(model.allowed(0), [Allowed::Only(Content::Zero)]);
    assert_eq!(
        model.allowed(1),
        [Allowed::Anything],
        "it went with the zeroes"
    );
}
