//! The model guest: its state is a function of its inputs, and every state it was ever in is a node of one tree.
//!
//! A step takes a request, mixes in something that no other execution would produce (two executions of the same request
//! differ, like interrupts and clocks make them differ), writes one of its memory pages, perhaps writes its disk,
//! perhaps flushes, and emits a numbered reply. A state *is* its node: two states are parts of one linear history if
//! one node is an ancestor of the other. That makes "consistent with one history" a question that can be answered.

/// Pages of guest memory; a step writes the one its node's number selects.
pub const PAGES: usize = 8;
/// Clients of the guest.
pub const CLIENTS: usize = 2;

/// One state the guest was in.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    /// The state before.
    pub parent: u32,
    /// Steps since the first state.
    pub depth: u32,
    /// The step's reply was about data that the guest had flushed.
    pub flushed: bool,
}

/// Every state of every execution in this run.
#[derive(Debug)]
pub struct History(Vec<Node>);

impl Default for History {
    fn default() -> Self {
        Self(vec![Node { parent: 0, depth: 0, flushed: false }])
    }
}

impl History {
    /// Adds a state.
    pub fn step(&mut self, parent: u32, flushed: bool) -> u32 {
        let depth = self.0[parent as usize].depth + 1;
        self.0.push(Node { parent, depth, flushed });
        u32::try_from(self.0.len() - 1).unwrap_or(u32::MAX)
    }

    /// A state.
    #[must_use]
    pub fn node(&self, n: u32) -> Node {
        self.0[n as usize]
    }

    /// Whether `a` is `b` or lies on the way to it.
    #[must_use]
    pub fn is_ancestor(&self, a: u32, b: u32) -> bool {
        let depth = self.0[a as usize].depth;
        let mut b = b;
        while self.0[b as usize].depth > depth {
            b = self.0[b as usize].parent;
        }
        a == b
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Change memory.
    Memory,
    /// Change memory and disk.
    Write,
    /// Change memory and disk, and flush before the reply.
    Flush,
}

/// A request of a client; numbers grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who asks.
    pub client: usize,
    /// Its number.
    pub number: u32,
    /// What for.
    pub op: Op,
}

/// A reply as it leaves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// To whom.
    pub client: usize,
    /// To which request.
    pub number: u32,
    /// The state that it tells of.
    pub node: u32,
}

/// The guest's whole state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Where it is in the history.
    pub node: u32,
    /// Its memory.
    pub pages: [u32; PAGES],
    /// Its disk's contents: the node that last wrote it.
    pub disk: u32,
    /// Per client the last request and the state after it, for answering a repeated request as before.
    pub last: [(u32, u32); CLIENTS],
}

/// What a step did besides changing the state.
#[derive(Clone, Copy, Debug)]
pub struct Stepped {
    /// The reply.
    pub reply: Reply,
    /// The page written, unless the request was a repeated one.
    pub page: Option<usize>,
    /// The disk was written.
    pub wrote: bool,
    /// The disk was flushed.
    pub flushed: bool,
}

impl State {
    /// Takes a request.
    pub fn take(&mut self, h: &mut History, r: Request) -> Option<Stepped> {
        let (number, node) = self.last[r.client];
        if r.number < number {
            return None;
        }
        if r.number == number && number > 0 {
            let reply = Reply { client: r.client, number, node };
            return Some(Stepped { reply, page: None, wrote: false, flushed: false });
        }
        let flushed = r.op == Op::Flush;
        let wrote = r.op != Op::Memory;
        let node = h.step(self.node, flushed);
        let page = node as usize % PAGES;
        self.node = node;
        self.pages[page] = node;
        if wrote {
            self.disk = node;
        }
        self.last[r.client] = (r.number, node);
        let reply = Reply { client: r.client, number: r.number, node };
        Some(Stepped { reply, page: Some(page), wrote, flushed })
    }

    /// The state after a boot from this disk: memory is gone. What the disk's writer had answered is known again, as a
    /// database knows it from its log.
    #[must_use]
    pub fn boot(h: &mut History, disk: u32) -> Self {
        let node = h.step(disk, false);
        let mut pages = [0; PAGES];
        pages[node as usize % PAGES] = node;
        Self { node, pages, disk, last: [(0, 0); CLIENTS] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_executions_of_one_request_are_two_histories() {
        let mut h = History::default();
        let a = State::default();
        let r = Request { client: 0, number: 1, op: Op::Write };
        let (mut x, mut y) = (a, a);
        x.take(&mut h, r);
        y.take(&mut h, r);
        assert!(!h.is_ancestor(x.node, y.node) && !h.is_ancestor(y.node, x.node));
        assert!(h.is_ancestor(a.node, x.node));
        let again = x.take(&mut h, r).map(|s| s.reply.node);
        assert_eq!(again, Some(x.node));
    }
}
