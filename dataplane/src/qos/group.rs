//! A group of volumes that share limits, also across workers.
//!
//! What the group's rate lets pass is dealt out to its members (max-min): each that is *active*, which has
//! asked within [`ACTIVE_NS`], gets an equal part; what one has no use for, because its own small stock is full,
//! goes to the others, and what nobody has a use for stays in the group's bucket up to its burst. So two busy
//! volumes have half each, however near to the other end their workers are and however fast they ask, and
//! an idle one costs the others nothing. A member that comes back has no claim to what it missed.
//!
//! A worker takes from its member's stock, which is a word that only this volume's workers touch. It is whoever
//! finds its stock empty that deals out, for all. It takes the group's lock for that only if nobody has it:
//! else another one deals out at that moment.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};

use bulkhead_protocol::limits::{Limits, Rate};

use super::bucket::depth;
use super::{Moment, lock};

/// Who has not asked for this long (20 ms) is idle: it gets nothing, and gives back what it has.
pub const ACTIVE_NS: u64 = 20_000_000;
const NS_PER_SECOND: u128 = 1_000_000_000;

/// A group.
#[derive(Debug)]
pub struct Group {
    limits_requests: AtomicBool,
    limits_bytes: AtomicBool,
    dealer: Mutex<Dealer>,
}

/// What a volume of a group may use.
#[derive(Debug, Default)]
pub(super) struct Member {
    requests: AtomicI64,
    bytes: AtomicI64,
    /// When it asked last, in ns; 0: never.
    asked: AtomicU64,
}

#[derive(Debug, Default)]
struct Dealer {
    members: Vec<Arc<Member>>,
    requests: Pool,
    bytes: Pool,
    /// When it dealt out last.
    at: Option<Moment>,
}

/// What was not dealt out.
#[derive(Debug, Default)]
struct Pool {
    rate: Option<Rate>,
    tokens: i64,
    /// Billionths of a token.
    rest: u64,
    /// Whose turn it is where there is less than one for each.
    first: usize,
}

impl Group {
    /// A group with full buckets and nobody in it.
    #[must_use]
    pub fn new(limits: &Limits) -> Arc<Self> {
        let group = Self {
            limits_requests: AtomicBool::new(false),
            limits_bytes: AtomicBool::new(false),
            dealer: Mutex::new(Dealer::default()),
        };
        group.set(limits);
        Arc::new(group)
    }

    /// Other limits for all of its members together. Effective as [`super::Qos::set`] is. What members have
    /// stays theirs; a bucket that had no rate begins full.
    pub fn set(&self, limits: &Limits) {
        let mut dealer = lock(&self.dealer);
        dealer.requests.set(limits.requests);
        dealer.bytes.set(limits.bytes);
        self.limits_requests
            .store(limits.requests.is_some(), Ordering::Relaxed);
        self.limits_bytes
            .store(limits.bytes.is_some(), Ordering::Relaxed);
    }

    pub(super) fn join(&self) -> Arc<Member> {
        let member = Arc::new(Member::default());
        lock(&self.dealer).members.push(Arc::clone(&member));
        member
    }

    /// A member gives its stock back, or leaves its debt to the others.
    pub(super) fn leave(&self, member: &Arc<Member>) {
        let mut dealer = lock(&self.dealer);
        dealer.members.retain(|other| !Arc::ptr_eq(other, member));
        let dealer = &mut *dealer;
        for (stock, pool) in [
            (&member.requests, &mut dealer.requests),
            (&member.bytes, &mut dealer.bytes),
        ] {
            pool.tokens = pool.tokens.saturating_add(stock.swap(0, Ordering::Relaxed));
        }
    }

    /// What a member may use now, of requests and of bytes; above 0 is enough for one more.
    pub(super) fn ask(&self, member: &Member, now: Moment) -> (i64, i64) {
        member.asked.store(now.ns().max(1), Ordering::Relaxed);
        let has = self.has(member);
        if has.0 > 0 && has.1 > 0 {
            return has;
        }
        match self.dealer.try_lock() {
            Ok(mut dealer) => dealer.deal(now),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().deal(now),
            Err(TryLockError::WouldBlock) => {}
        }
        self.has(member)
    }

    fn has(&self, member: &Member) -> (i64, i64) {
        let of = |is_limited: &AtomicBool, stock: &AtomicI64| {
            if is_limited.load(Ordering::Relaxed) {
                stock.load(Ordering::Relaxed)
            } else {
                i64::MAX
            }
        };
        (
            of(&self.limits_requests, &member.requests),
            of(&self.limits_bytes, &member.bytes),
        )
    }

    /// A member has used so much, whether it had it or not.
    pub(super) fn take(&self, member: &Member, requests: u64, bytes: u64) {
        for (is_limited, stock, used) in [
            (&self.limits_requests, &member.requests, requests),
            (&self.limits_bytes, &member.bytes, bytes),
        ] {
            if used > 0 && is_limited.load(Ordering::Relaxed) {
                stock.fetch_sub(i64::try_from(used).unwrap_or(i64::MAX), Ordering::Relaxed);
            }
        }
    }
}

impl Dealer {
    fn deal(&mut self, now: Moment) {
        let since = self.at.map_or(0, |at| now.since(at).as_nanos());
        self.at = Some(self.at.map_or(now, |at| at.max(now)));
        let members = &self.members;
        self.requests
            .deal(members, |member| &member.requests, since, now);
        self.bytes.deal(members, |member| &member.bytes, since, now);
    }
}

impl Member {
    fn is_active(&self, now: Moment) -> bool {
        let asked = self.asked.load(Ordering::Relaxed);
        asked > 0 && now.ns().saturating_sub(asked) < ACTIVE_NS
    }
}

impl Pool {
    fn set(&mut self, rate: Option<Rate>) {
        if let (None, Some(rate)) = (self.rate, rate) {
            self.tokens = i64::try_from(depth(rate)).unwrap_or(i64::MAX);
            self.rest = 0;
        }
        self.rate = rate;
    }

    /// Adds what has come in `since_ns`, takes back what idle members have, and deals out.
    fn deal(
        &mut self,
        members: &[Arc<Member>],
        stock: impl Fn(&Member) -> &AtomicI64,
        since_ns: u128,
        now: Moment,
    ) {
        let Some(rate) = self.rate else {
            return;
        };
        self.fill(rate, since_ns);
        let mut active = 0;
        for member in members {
            if member.is_active(now) {
                active += 1;
            } else {
                self.take_back(stock(member));
            }
        }
        let depth = i64::try_from(depth(rate)).unwrap_or(i64::MAX).max(active);
        let part = depth / active.max(1);
        let has = |member: &Member| stock(member).load(Ordering::Relaxed);
        // Two rounds leave little: the second is for what the first found no room for.
        for _ in 0..2 {
            // Who is idle only pays its debt.
            let room = |member: &Member| {
                let most = if member.is_active(now) { part } else { 0 };
                most.saturating_sub(has(member)).max(0)
            };
            self.deal_round(members, &room, &stock);
        }
        let dealt: i64 = members.iter().map(|member| has(member).max(0)).sum();
        self.tokens = self.tokens.min(depth.saturating_sub(dealt));
    }

    fn fill(&mut self, rate: Rate, since_ns: u128) {
        let come = since_ns
            .saturating_mul(u128::from(rate.per_second))
            .saturating_add(u128::from(self.rest));
        self.rest = u64::try_from(come % NS_PER_SECOND).unwrap_or(0);
        let whole = i64::try_from(come / NS_PER_SECOND).unwrap_or(i64::MAX);
        self.tokens = self.tokens.saturating_add(whole);
    }

    /// What an idle member has goes back. Its worker may take from it at this moment: what it takes then is a
    /// debt.
    fn take_back(&mut self, stock: &AtomicI64) {
        let has = stock.load(Ordering::Relaxed);
        if has > 0 {
            stock.fetch_sub(has, Ordering::Relaxed);
            self.tokens = self.tokens.saturating_add(has);
        }
    }

    fn deal_round(
        &mut self,
        members: &[Arc<Member>],
        room: &impl Fn(&Member) -> i64,
        stock: &impl Fn(&Member) -> &AtomicI64,
    ) {
        let count = members.iter().filter(|member| room(member) > 0).count();
        let each = self.tokens / i64::try_from(count).unwrap_or(1).max(1);
        let from = self.first.checked_rem(members.len()).unwrap_or(0);
        let order = (from..members.len()).chain(0..from);
        for (at, member) in order.filter_map(|at| Some((at, members.get(at)?))) {
            if self.tokens <= 0 {
                self.first = at;
                return;
            }
            let given = room(member).min(each.max(1));
            stock(member).fetch_add(given, Ordering::Relaxed);
            self.tokens -= given;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn group(per_second: u64, burst: u64) -> Arc<Group> {
        Group::new(&Limits {
            requests: Some(Rate { per_second, burst }),
            bytes: None,
        })
    }

    /// A volume that asks every `period` ns and takes at most `most` then.
    struct Volume {
        member: Arc<Member>,
        period: u64,
        most: i64,
        taken: u64,
    }

    fn volume(group: &Group, period: u64, most: i64) -> Volume {
        Volume {
            member: group.join(),
            period,
            most,
            taken: 0,
        }
    }

    /// Runs them from one moment to another.
    fn run(group: &Group, volumes: &mut [Volume], from: u64, to: u64) {
        for ns in (from..to).step_by(1000) {
            for volume in &mut *volumes {
                if ns % volume.period == 0 {
                    let (has, _) = group.ask(&volume.member, Moment::from_ns(ns));
                    let taken = u64::try_from(has.min(volume.most)).unwrap_or(0);
                    group.take(&volume.member, taken, 0);
                    volume.taken += taken;
                }
            }
        }
    }

    #[test]
    fn two_busy_members_have_half_each_however_often_they_ask() {
        // One asks all the time, the other one every 3 ms and finds its stock full by then.
        let group = group(10_000, 1000);
        let mut volumes = [volume(&group, 1000, 16), volume(&group, 3_000_000, 1000)];
        run(&group, &mut volumes, 0, 2 * SECOND);
        let before = [volumes[0].taken, volumes[1].taken];
        run(&group, &mut volumes, 2 * SECOND, 4 * SECOND);
        let [a, b] = [volumes[0].taken - before[0], volumes[1].taken - before[1]];
        assert!(
            a.abs_diff(10_000) < 200 && b.abs_diff(10_000) < 200,
            "{a} {b}"
        );
    }

    #[test]
    fn what_one_does_not_use_is_the_others() {
        // 1,000 of 10,000 a second: the rest is the other one's.
        let group = group(10_000, 100);
        let mut volumes = [volume(&group, 1000, 16), volume(&group, 1_000_000, 1)];
        run(&group, &mut volumes, 0, 2 * SECOND);
        let [a, b] = [volumes[0].taken, volumes[1].taken];
        assert!(b.abs_diff(2000) < 20 && a.abs_diff(18_100) < 200, "{a} {b}");
    }

    #[test]
    fn an_idle_member_costs_the_others_nothing_and_saves_nothing_up() {
        let group = group(10_000, 100);
        let mut volumes = [volume(&group, 1000, 16), volume(&group, 1000, 16)];
        run(&group, &mut volumes[..1], 0, 2 * SECOND);
        assert!(
            volumes[0].taken.abs_diff(20_100) < 100,
            "{}",
            volumes[0].taken
        );
        let before = volumes[0].taken;
        run(&group, &mut volumes, 2 * SECOND, 4 * SECOND);
        let [a, b] = [volumes[0].taken - before, volumes[1].taken];
        assert!(
            a.abs_diff(b) < 200 && (a + b).abs_diff(20_000) < 150,
            "{a} {b}"
        );
    }

    #[test]
    fn a_slow_rate_is_shared_one_by_one() {
        let group = group(10, 1);
        let mut volumes: Vec<Volume> = (0..4).map(|_| volume(&group, 1000, 16)).collect();
        run(&group, &mut volumes, 0, 8 * SECOND);
        let taken: Vec<u64> = volumes.iter().map(|volume| volume.taken).collect();
        assert!(taken.iter().all(|one| one.abs_diff(20) <= 2), "{taken:?}");
    }

    #[test]
    fn a_debt_is_the_members_own_and_is_paid_also_while_it_is_idle() {
        let group = Group::new(&Limits {
            requests: None,
            bytes: Some(Rate {
                per_second: 1_000_000,
                burst: 1000,
            }),
        });
        let (debtor, other) = (group.join(), group.join());
        group.ask(&debtor, Moment::from_ns(0));
        group.take(&debtor, 1, 500_000);
        // Half of what comes is the other one's meanwhile.
        let mut taken = 0;
        for ns in (0..SECOND / 2).step_by(100_000) {
            let (_, has) = group.ask(&other, Moment::from_ns(ns));
            let has = u64::try_from(has).unwrap_or(0);
            group.take(&other, 1, has);
            taken += has;
        }
        assert!(taken.abs_diff(250_000) < 10_000, "{taken}");
        assert!(group.ask(&debtor, Moment::from_ns(SECOND / 2)).1 < 0);
        assert!(group.ask(&debtor, Moment::from_ns(2 * SECOND)).1 > 0);
    }

    #[test]
    fn who_leaves_gives_back_what_it_has() {
        let group = group(1, 100);
        let (one, other) = (group.join(), group.join());
        assert_eq!(group.ask(&one, Moment::from_ns(1)).0, 100);
        group.leave(&one);
        assert_eq!(group.ask(&other, Moment::from_ns(1)).0, 100);
    }
}
