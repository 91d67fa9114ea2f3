//! Continuous batching as a pure state machine: which rows run next, and on which pages.
//!
//! Requests with one prompt that arrive in a row form a group. The group's prompt but for its last token runs once; its
//! full pages are shared, and every sample starts on a copy of the page that is begun. A sample is admitted only when
//! its longest course fits into the pages, so nothing is ever preempted. A group that has begun keeps pages for one of
//! its members at a time until all have run, so that groups can never wait for each other. What is drawn does not depend
//! on any of this.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};

use crate::compute::ops::{Draw, Drawn, MAX_STOPS, PAGE, Seat};
use crate::error::{Error, Result};
use crate::rollout::pages::PagePool;

/// A sample to draw.
#[derive(Debug, Clone)]
pub struct SampleRequest {
    /// Id of the sequence; with the run's seed it decides what is drawn.
    pub id: u64,
    /// Prompt tokens, at least one.
    pub prompt: Arc<[u32]>,
    /// Most tokens to draw.
    pub max_new: usize,
    /// Tokens after which the sample ends.
    pub stop: Arc<[u32]>,
    /// Temperature; 0 is greedy.
    pub temperature: f32,
    /// Nucleus; 1 keeps all.
    pub top_p: f32,
    /// Likeliest tokens kept; 0 keeps all.
    pub top_k: usize,
}

/// Why a sample ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Finish {
    /// It drew a stop token.
    Stop,
    /// It drew as many tokens as it might.
    Length,
}

/// A finished sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Completion {
    /// Id of the sequence.
    pub id: u64,
    /// Drawn tokens, the stop token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each (nats).
    #[serde(deserialize_with = "numbers")]
    pub logprobs: Vec<f32>,
    /// Mean entropy of the distributions that they were drawn from (nats).
    #[serde(deserialize_with = "number")]
    pub entropy: f64,
    /// Why it ended.
    pub finish: Finish,
}

/// JSON has null where a number was none: what a step that taught nothing leaves behind must not end the next.
fn number<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

fn numbers<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<Vec<f32>, D::Error> {
    let found: Vec<Option<f32>> = Vec::deserialize(from)?;
    Ok(found.into_iter().map(|n| n.unwrap_or(f32::NAN)).collect())
}

/// Bounds of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most samples at once.
    pub max_running: usize,
    /// Most rows of one step.
    pub max_rows: usize,
    /// Pages of the KV cache.
    pub num_pages: usize,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// Prompt tokens `start .. start + len` of a group.
    Prefill {
        /// Index of the group.
        group: usize,
        /// First token.
        start: usize,
        /// Number of tokens.
        len: usize,
    },
    /// The newest token of a sample.
    Decode {
        /// Seat of the sample.
        sample: usize,
    },
}

/// What a step does: copies of pages, then rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Pages to copy, (from, to), before anything runs.
    pub copies: Vec<(u32, u32)>,
    /// Rows to run.
    pub rows: Vec<Row>,
}

#[derive(Debug)]
struct Group {
    key: u64,
    prompt: Arc<[u32]>,
    pages: Vec<u32>,
    done: usize,
    /// Number of pages set aside for one member: as many as any of them needs.
    lane: usize,
    /// Whether a member is running on them.
    lane_taken: bool,
    members: VecDeque<SampleRequest>,
}

impl Group {
    /// Tokens that all members share.
    fn shared(&self) -> usize {
        self.prompt.len() - 1
    }
}

/// Where a sample's own pages come from.
#[derive(Debug, Clone, Copy)]
enum Holds {
    /// The pages that the group with this key has set aside.
    Lane(u64),
    /// A reservation of so many.
    Pages(usize),
}

#[derive(Debug)]
struct Sample {
    request: SampleRequest,
    pages: Vec<u32>,
    holds: Holds,
    /// Tokens whose keys and values are in the pages, once the steps on their way have run.
    len: usize,
    /// Steps whose draws have not come yet.
    flying: usize,
    /// Whether the device has it in its seat.
    seated: bool,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    entropy: f64,
}

impl Sample {
    /// Whether there is something to draw beyond the steps on their way.
    fn goes_on(&self) -> bool {
        self.tokens.len() + self.flying < self.request.max_new
    }

    fn draw(&self) -> Draw {
        let r = &self.request;
        Draw { seq: r.id, temperature: r.temperature, top_p: r.top_p, top_k: r.top_k }
    }
}

/// Draws on their way: the seats that draw and the ids of their samples.
pub type Flight = Vec<(usize, u64)>;

/// The state of a batch.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pages: PagePool,
    reserved: usize,
    next_key: u64,
    waiting: VecDeque<Group>,
    groups: Vec<Group>,
    /// By seat.
    samples: Vec<Option<Sample>>,
    running: usize,
    /// Requests, taken in and not ended, that are nothing for a seat.
    unusual: usize,
    /// Most tokens of a sample so far.
    longest: usize,
}

/// Whether a request is nothing for a seat.
fn is_unusual(request: &SampleRequest) -> bool {
    request.stop.len() > MAX_STOPS
}

impl Scheduler {
    /// An idle scheduler.
    pub fn new(limits: Limits) -> Self {
        assert!(limits.max_running > 0 && limits.max_rows > 0, "a batch holds something");
        Scheduler {
            pages: PagePool::new(limits.num_pages),
            limits,
            reserved: 0,
            next_key: 0,
            waiting: VecDeque::new(),
            groups: Vec::new(),
            samples: Vec::new(),
            running: 0,
            unusual: 0,
            longest: 0,
        }
    }

    /// Takes a request in.
    ///
    /// # Errors
    /// When it could never fit.
    pub fn submit(&mut self, request: SampleRequest) -> Result<()> {
        assert!(!request.prompt.is_empty() && request.max_new > 0, "a prompt, and something to draw");
        let whole = (request.prompt.len() + request.max_new).div_ceil(PAGE) + 1;
        if whole > self.limits.num_pages {
            return Err(Error::new(
                crate::error::Kind::OutOfMemory,
                format!("a sample needs {whole} KV pages and there are {}", self.limits.num_pages),
            )
            .with_hint(
                "lower rollout.max_prompt, rollout.max_propose or rollout.max_solve, or raise rollout.kv_tokens",
            ));
        }
        self.unusual += usize::from(is_unusual(&request));
        self.longest = self.longest.max(request.prompt.len() + request.max_new);
        match self.waiting.back_mut() {
            Some(group) if group.prompt == request.prompt => group.members.push_back(request),
            _ => {
                self.next_key += 1;
                self.waiting.push_back(Group {
                    key: self.next_key,
                    prompt: request.prompt.clone(),
                    pages: Vec::new(),
                    done: 0,
                    lane: 0,
                    lane_taken: false,
                    members: VecDeque::from([request]),
                });
            }
        }
        Ok(())
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.groups.is_empty() && self.running == 0
    }

    /// Number of samples that are being drawn.
    pub fn num_running(&self) -> usize {
        self.running
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        *self = Scheduler::new(self.limits);
    }

    /// Pages that a sample needs beyond those it shares.
    fn own_pages(request: &SampleRequest) -> usize {
        (request.prompt.len() + request.max_new).div_ceil(PAGE) - (request.prompt.len() - 1) / PAGE
    }

    /// The next step.
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        self.admit(&mut plan);
        let going = self.samples.iter().enumerate().filter(|(_, s)| s.as_ref().is_some_and(Sample::goes_on));
        plan.rows.extend(going.map(|(sample, _)| Row::Decode { sample }));
        let mut budget = self.limits.max_rows.saturating_sub(plan.rows.len()).max(1);
        for (i, group) in self.groups.iter().enumerate() {
            let len = (group.shared() - group.done).min(budget);
            if len > 0 {
                plan.rows.push(Row::Prefill { group: i, start: group.done, len });
                budget -= len;
            }
        }
        plan
    }

    fn admit(&mut self, plan: &mut Plan) {
        self.admit_members(plan);
        self.open_groups();
        // A prompt of one token has nothing to run before its members.
        self.admit_members(plan);
    }

    /// Admits members of groups whose prompt has run.
    fn admit_members(&mut self, plan: &mut Plan) {
        let Scheduler { limits, pages, reserved, groups, samples, running, .. } = self;
        for group in groups.iter_mut().filter(|g| g.done == g.shared()) {
            while *running < limits.max_running
                && let Some(request) = group.members.front()
            {
                let need = Self::own_pages(request);
                let holds = if !group.lane_taken {
                    group.lane_taken = true;
                    Holds::Lane(group.key)
                } else if *reserved + need <= limits.num_pages {
                    *reserved += need;
                    Holds::Pages(need)
                } else {
                    break;
                };
                let full = group.shared() / PAGE;
                let mut table = group.pages[..full].to_vec();
                table.iter().for_each(|p| pages.share(*p));
                table.extend((0..need).map(|_| pages.take().expect("a sample's longest course is reserved")));
                plan.copies.extend(group.pages.get(full).map(|begun| (*begun, table[full])));
                let request = group.members.pop_front().expect("there is a front");
                let sample = Sample {
                    pages: table,
                    holds,
                    len: group.shared(),
                    flying: 0,
                    seated: false,
                    tokens: Vec::new(),
                    logprobs: Vec::new(),
                    entropy: 0.0,
                    request,
                };
                *running += 1;
                match samples.iter_mut().find(|s| s.is_none()) {
                    Some(seat) => *seat = Some(sample),
                    None => samples.push(Some(sample)),
                }
            }
        }
    }

    /// Takes up waiting groups while their prompt and one member fit.
    fn open_groups(&mut self) {
        let Scheduler { limits, pages, reserved, groups, running, waiting, .. } = self;
        while let Some(group) = waiting.front() {
            let shared_pages = group.shared().div_ceil(PAGE);
            let lane = group.members.iter().map(Self::own_pages).max().expect("a group has members");
            let open: usize = groups.iter().filter(|g| g.done < g.shared()).count();
            if *reserved + shared_pages + lane > limits.num_pages || *running + open >= limits.max_running {
                break;
            }
            *reserved += shared_pages + lane;
            let mut group = waiting.pop_front().expect("there is a front");
            group.lane = lane;
            group.pages = (0..shared_pages).map(|_| pages.take().expect("reserved")).collect();
            groups.push(group);
        }
    }

    /// Tokens of a row with their first position, the page table, and how to draw.
    pub fn row(&self, row: Row) -> (&[u32], usize, &[u32], Option<Draw>) {
        match row {
            Row::Prefill { group, start, len } => {
                let group = &self.groups[group];
                (&group.prompt[start..start + len], start, &group.pages, None)
            }
            Row::Decode { sample } => {
                let s = self.sample(sample);
                let token = match s.tokens.as_slice() {
                    [] => &s.request.prompt[s.request.prompt.len() - 1..],
                    tokens => &tokens[tokens.len() - 1..],
                };
                (token, s.len, &s.pages, Some(s.draw()))
            }
        }
    }

    fn sample(&self, seat: usize) -> &Sample {
        self.samples[seat].as_ref().expect("a row's seat is taken")
    }

    /// Whether all samples that wait or run may be drawn by the device alone.
    pub fn all_usual(&self) -> bool {
        self.unusual == 0
    }

    /// Most tokens that a sample may have.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Whether most seats are empty below the last that is taken.
    pub fn is_sparse(&self) -> bool {
        self.samples.len() > 8 && 2 * self.running <= self.samples.len()
    }

    /// Moves samples to the first seats. No draws may be on their way.
    pub fn close_up(&mut self) {
        let mut samples: Vec<Sample> = std::mem::take(&mut self.samples).into_iter().flatten().collect();
        assert!(samples.iter().all(|s| s.flying == 0), "draws know their sample's seat");
        samples.iter_mut().for_each(|s| s.seated = false);
        self.samples = samples.into_iter().map(Some).collect();
    }

    /// Forgets who the device has in its seats. No draws may be on their way.
    pub fn unseat(&mut self) {
        self.samples.iter_mut().flatten().for_each(|s| s.seated = false);
    }

    /// Samples that the device has yet to seat; it has them from now on.
    pub fn new_seats(&mut self) -> Vec<usize> {
        let seats = self.samples.iter_mut().enumerate();
        let new = seats.filter_map(|(i, s)| s.as_mut().filter(|s| !s.seated).map(|s| (i, s)));
        new.map(|(i, s)| {
            s.seated = true;
            i
        })
        .collect()
    }

    /// How the device seats a sample whose draws have all come.
    pub fn seat(&self, seat: usize) -> Seat<'_> {
        let s = self.sample(seat);
        assert_eq!(s.flying, 0, "its newest token is known");
        let (token, pos, pages, _) = self.row(Row::Decode { sample: seat });
        let left = s.request.max_new - s.tokens.len();
        Seat { seat, token: token[0], pos, draw: s.draw(), stop: &s.request.stop, left, pages }
    }

    /// Seats that are taken, with the whole pages of their prompts.
    pub fn prefixes(&self) -> Vec<(usize, &[u32])> {
        let taken = self.samples.iter().enumerate().filter_map(|(i, s)| Some((i, s.as_ref()?)));
        taken.map(|(i, s)| (i, &s.pages[..(s.request.prompt.len() - 1) / PAGE])).collect()
    }

    /// Number of seats up to the last that draws in a plan, and most keys that one of its rows sees.
    pub fn extent(&self, plan: &Plan) -> (usize, usize) {
        plan.rows.iter().fold((0, 0), |(seats, longest), row| match *row {
            Row::Decode { sample } => (seats.max(sample + 1), longest.max(self.sample(sample).len + 1)),
            Row::Prefill { .. } => (seats, longest),
        })
    }

    /// A plan's rows have been launched: what they will draw.
    pub fn launched(&mut self, plan: &Plan) -> Flight {
        let mut flight = Flight::with_capacity(plan.rows.len());
        for row in &plan.rows {
            match *row {
                Row::Prefill { group, len, .. } => self.groups[group].done += len,
                Row::Decode { sample } => {
                    let s = self.samples[sample].as_mut().expect("a row's seat is taken");
                    s.len += 1;
                    s.flying += 1;
                    flight.push((sample, s.request.id));
                }
            }
        }
        flight
    }

    /// Takes in what was drawn, by seat, and returns the samples that ended.
    pub fn landed(&mut self, flight: &Flight, drawn: impl Fn(usize) -> Drawn) -> Vec<Completion> {
        let mut completions = Vec::new();
        for (seat, id) in flight {
            // One that has ended in the meantime drew once too often.
            let known = self.samples.get_mut(*seat).and_then(Option::as_mut);
            let Some(s) = known.filter(|s| s.request.id == *id) else { continue };
            let drawn = drawn(*seat);
            s.flying -= 1;
            s.tokens.push(drawn.token);
            s.logprobs.push(drawn.logprob);
            s.entropy += f64::from(drawn.entropy);
            let finish = if s.request.stop.contains(&drawn.token) {
                Finish::Stop
            } else if s.tokens.len() == s.request.max_new {
                Finish::Length
            } else {
                continue;
            };
            completions.extend(self.samples[*seat].take().map(|s| self.end(s, finish)));
        }
        while self.samples.last().is_some_and(Option::is_none) {
            self.samples.pop();
        }
        if !completions.is_empty() {
            self.close_groups();
        }
        completions
    }

    fn end(&mut self, mut s: Sample, finish: Finish) -> Completion {
        self.running -= 1;
        self.unusual -= usize::from(is_unusual(&s.request));
        s.pages.iter().for_each(|p| self.pages.give_back(*p));
        match s.holds {
            Holds::Pages(n) => self.reserved -= n,
            Holds::Lane(key) => {
                let group = self.groups.iter_mut().find(|g| g.key == key);
                group.expect("a group outlives its members").lane_taken = false;
            }
        }
        Completion {
            id: s.request.id,
            entropy: s.entropy / s.tokens.len() as f64,
            tokens: std::mem::take(&mut s.tokens),
            logprobs: std::mem::take(&mut s.logprobs),
            finish,
        }
    }

    /// Takes in what a plan's rows drew, and returns the samples that ended.
    pub fn apply(&mut self, plan: &Plan, drawn: &[Option<Drawn>]) -> Vec<Completion> {
        assert_eq!(plan.rows.len(), drawn.len(), "a result per row");
        let flight = self.launched(plan);
        let mut by_seat = vec![None; self.samples.len()];
        for (row, drawn) in plan.rows.iter().zip(drawn) {
            if let Row::Decode { sample } = *row {
                by_seat[sample] = *drawn;
            }
        }
        self.landed(&flight, |seat| by_seat[seat].expect("a decoding row draws"))
    }

    /// Ends groups whose members have all been admitted and no longer use what is theirs.
    fn close_groups(&mut self) {
        let Scheduler { groups, pages, reserved, .. } = self;
        groups.retain(|group| {
            let full = group.shared() / PAGE;
            let in_use = group.pages[..full].iter().any(|p| pages.holders(*p) > 1);
            if !group.members.is_empty() || group.lane_taken || in_use {
                return true;
            }
            group.pages.iter().for_each(|p| pages.give_back(*p));
            *reserved -= group.pages.len() + group.lane;
            false
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_that_are_none_go_through_json() {
        let of = |x: f32| Completion {
            id: 1,
            tokens: vec![3, 4],
            logprobs: vec![-0.5, x],
            entropy: f64::from(x),
            finish: Finish::Length,
        };
        let back = |c: &Completion| -> Completion {
            serde_json::from_str(&serde_json::to_string(c).expect("plain data")).expect("the same")
        };
        let (good, bad) = (back(&of(-1.5)), back(&of(f32::NAN)));
        assert_eq!((good.logprobs, good.entropy), (vec![-0.5, -1.5], -1.5));
        assert!(bad.logprobs[0] == -0.5 && bad.logprobs[1].is_nan() && bad.entropy.is_nan());
    }

    /// Runs requests through with tokens that depend on (id, position) alone, and checks the pages at every step. With
    /// `late`, a step is planned before the draws of the last have come.
    fn run(limits: Limits, requests: &[SampleRequest], arrivals: &[usize], late: bool) -> Vec<Completion> {
        let mut scheduler = Scheduler::new(limits);
        let (mut done, mut next, mut steps) = (Vec::new(), 0, 0);
        let mut on_its_way: (Flight, Vec<Option<Drawn>>) = Default::default();
        let land = |scheduler: &mut Scheduler, (flight, drawn): &(Flight, Vec<Option<Drawn>>)| {
            scheduler.landed(flight, |seat| drawn[seat].expect("a flight's seats draw"))
        };
        while next < requests.len() || !scheduler.is_idle() {
            let count = arrivals.get(steps % arrivals.len().max(1)).copied().unwrap_or(1).max(1);
            for request in requests.iter().skip(next).take(count) {
                scheduler.submit(request.clone()).expect("it fits");
            }
            next = (next + count).min(requests.len());
            if scheduler.is_sparse() {
                done.extend(land(&mut scheduler, &std::mem::take(&mut on_its_way)));
                scheduler.close_up();
            }
            let plan = scheduler.plan();
            assert!(!plan.rows.is_empty() || scheduler.is_idle() || !on_its_way.0.is_empty(), "no progress");
            let decoding = plan.rows.iter().filter(|r| matches!(r, Row::Decode { .. })).count();
            assert!(decoding <= limits.max_running && scheduler.extent(&plan).0 >= decoding);
            for seat in scheduler.new_seats() {
                let seat = scheduler.seat(seat);
                assert!(seat.pages.len() * PAGE >= seat.pos + seat.left, "pages for the longest course");
            }
            let mut writers = std::collections::HashMap::new();
            let mut drawn = vec![None; limits.max_running];
            for row in &plan.rows {
                let (tokens, pos, pages, draw) = scheduler.row(*row);
                assert!(pages.len() * PAGE >= pos + tokens.len(), "room for every row");
                for at in pos..pos + tokens.len() {
                    // A page that is written has one writer, and no other holder when it belongs to a sample.
                    let page = pages[at / PAGE];
                    let writer = writers.entry(page).or_insert(*row);
                    assert_eq!(writer, row, "two writers of a page");
                    assert_eq!(scheduler.pages.holders(page), 1, "a shared page is written");
                }
                if let (Row::Decode { sample }, Some(d)) = (*row, draw) {
                    let token = ((d.seq * 31 + pos as u64 * 7) % 11) as u32;
                    drawn[sample] = Some(Drawn { token, logprob: -(pos as f32), entropy: 1.0 });
                }
            }
            let launched = (scheduler.launched(&plan), drawn);
            let landing = if late { std::mem::replace(&mut on_its_way, launched) } else { launched };
            done.extend(land(&mut scheduler, &landing));
            steps += 1;
            assert!(steps < 100_000, "it ends");
        }
        assert_eq!(scheduler.pages.num_free(), limits.num_pages, "all pages are back");
        assert_eq!(scheduler.reserved, 0, "nothing stays reserved");
        done.sort_by_key(|c| c.id);
        done
    }

    fn requests() -> impl Strategy<Value = Vec<SampleRequest>> {
        let group = (1usize..60, 1usize..40, 1usize..9);
        proptest::collection::vec(group, 1..12).prop_map(|groups| {
            let mut id = 0;
            let mut all = Vec::new();
            for (g, (len, max_new, members)) in groups.into_iter().enumerate() {
                let prompt: Arc<[u32]> = (0..len).map(|i| (i + g) as u32).collect();
                for _ in 0..members {
                    all.push(SampleRequest {
                        id,
                        prompt: prompt.clone(),
                        max_new,
                        stop: Arc::new([3]),
                        temperature: 1.0,
                        top_p: 1.0,
                        top_k: 0,
                    });
                    id += 1;
                }
            }
            all
        })
    }

    proptest! {
        #[test]
        fn no_page_leaks_and_no_limit_arrival_or_lateness_changes_a_sample(
            requests in requests(),
            max_running in 1usize..20,
            max_rows in 1usize..80,
            spare in 0usize..40,
            arrivals in proptest::collection::vec(1usize..20, 1..5),
            late: bool,
        ) {
            let wide = Limits { max_running: 1000, max_rows: 100_000, num_pages: 10_000 };
            let narrow = Limits { max_running, max_rows, num_pages: 8 + spare };
            let all = run(wide, &requests, &[requests.len()], false);
            prop_assert_eq!(all.len(), requests.len());
            prop_assert_eq!(run(narrow, &requests, &arrivals, late), all);
        }
    }

    #[test]
    fn a_request_with_more_stop_tokens_than_a_seat_knows_is_the_hosts() {
        let with = |n: usize| SampleRequest {
            id: 0,
            prompt: Arc::new([1]),
            max_new: 1,
            stop: (0..n as u32).collect(),
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
        };
        assert!(!is_unusual(&with(MAX_STOPS)) && is_unusual(&with(MAX_STOPS + 1)));
    }

    #[test]
    fn what_can_never_fit_is_refused() {
        let mut scheduler = Scheduler::new(Limits { max_running: 1, max_rows: 1, num_pages: 2 });
        let request = SampleRequest {
            id: 0,
            prompt: Arc::new([1; 20]),
            max_new: 20,
            stop: Arc::new([]),
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
        };
        assert_eq!(scheduler.submit(request).expect_err("too long").exit_code(), 5);
    }
}
