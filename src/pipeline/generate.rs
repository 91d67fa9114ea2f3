//! One round of generation: every proposal and solution from prompt to grade, in one continuous batch.
//!
//! Three things go on at once: the rollout engine samples, executor processes validate and grade, and this loop passes
//! work between them. A proposal's probes are admitted the moment its task validates. Nothing here depends on the order
//! in which work comes back: records are found by id, and whoever reads a finished [`Round`] goes through it in id order.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::base::stop::StopFlag;
use crate::compute::ops::Backend;
use crate::error::{Error, Kind, Result};
use crate::exec::pool::Pool;
use crate::exec::protocol::{Call, Outcome, Profile, Request, Verdict};
use crate::model::forward::Decoder;
use crate::pipeline::judge::{Grade, Judge};
use crate::rollout::engine::{Completion, Engine, Finish, SampleRequest};
use crate::selfplay::buffer::Buffers;
use crate::selfplay::codec::Codec;
use crate::selfplay::config::Duplicates;
use crate::selfplay::constraint::{Constraints, Hits};
use crate::selfplay::gate::{self, GateConfig};
use crate::selfplay::parse::{self, Draft};
use crate::selfplay::prompt::{self, Piece};
use crate::selfplay::reward::InductionReward;
use crate::selfplay::task::{Config, Role, Task, TaskKind};

/// How long the loop waits for the executor when there is nothing to sample.
const EXECUTOR_WAIT: Duration = Duration::from_millis(50);

/// Id of a sequence: step, configuration, index in the configuration, and 0 for a proposal, 1.. for its probes, or 0.. for
/// the answers to a task.
pub fn sequence_id(step: u64, config: Config, index: usize, probe: usize) -> u64 {
    step << 32 | (config.index() as u64) << 24 | (index as u64) << 8 | probe as u64
}

/// A sampled answer to a task.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Attempt {
    /// Id of the sequence.
    pub id: u64,
    /// What earlier steps have drawn of it.
    pub earlier: Earlier,
    /// What the engine returned.
    pub completion: Option<Completion>,
    /// Whether the completion keeps to the format.
    pub format_ok: bool,
    /// The answer, if one can be found.
    pub answer: Option<String>,
    /// The grade, once decided.
    pub grade: Option<Grade>,
    /// Constraints that the completion hits.
    #[serde(skip)]
    pub hits: Hits,
}

impl Attempt {
    fn new(id: u64) -> Self {
        Attempt { id, ..Attempt::default() }
    }

    fn watched(&mut self) -> (&Option<Completion>, &mut Hits) {
        (&self.completion, &mut self.hits)
    }

    /// Whether every check passed.
    pub fn is_right(&self) -> bool {
        self.accuracy() == 1.0
    }

    /// Share of the checks passed; 0 while undecided.
    pub fn accuracy(&self) -> f64 {
        self.grade.as_ref().map_or(0.0, |g| g.accuracy)
    }
}

/// A proposed task on its way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Proposal {
    /// Id of the sequence.
    pub id: u64,
    /// Task type and role.
    pub config: Config,
    /// Tokens of the prompt.
    pub prompt: Arc<[u32]>,
    /// Programs shown as references.
    pub references: Vec<Arc<Task>>,
    /// Functions that the program had to call.
    pub composites: Vec<String>,
    /// What earlier steps have drawn of it.
    pub earlier: Earlier,
    /// What the engine returned.
    pub completion: Option<Completion>,
    /// Whether the completion keeps to the format.
    pub format_ok: bool,
    /// The validated task.
    pub task: Option<Arc<Task>>,
    /// Why there is none.
    pub rejection: Option<String>,
    /// Whether it would be one, were the solver's prompt not too long: it counts as solved by nobody, and is not kept.
    #[serde(default)]
    pub is_too_long: bool,
    /// Constraints that the completion hits.
    #[serde(skip)]
    pub hits: Hits,
    /// Solver samples that measure the difficulty.
    pub probes: Vec<Attempt>,
    /// Their prompt.
    pub probe_prompt: Option<Arc<[u32]>>,
    #[serde(skip)]
    draft: Option<Draft>,
    /// Probes without a grade.
    pub ungraded: usize,
}

/// What a proposer's prompt shows.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    /// Programs as references.
    pub references: Vec<Arc<Task>>,
    /// Functions that the program must call.
    pub composites: Vec<String>,
}

/// A task to solve and its one trained answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Solve {
    /// Task type and role.
    pub config: Config,
    /// The task.
    pub task: Arc<Task>,
    /// Whether it is a curated one.
    pub edge_case: bool,
    /// Whether its message misleads: then the answer is not trained on.
    pub misleading: bool,
    /// Tokens of the prompt.
    pub prompt: Arc<[u32]>,
    /// The answer.
    pub attempt: Attempt,
}

impl Solve {
    /// Whether its task stands in a buffer, whose record of the task the answer goes into. An answer that took several
    /// steps does not count there: the task may have left the buffer.
    pub fn is_recorded(&self) -> bool {
        !self.edge_case && self.attempt.earlier.stale == 0
    }
}

/// What earlier steps have drawn of a sequence, with the weights that the model had then.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Earlier {
    /// All that has been drawn, while the sequence has not ended.
    pub begun: Option<Completion>,
    /// Tokens at the completion's start that the present weights have not drawn.
    pub stale: usize,
}

impl Earlier {
    /// Takes in what one step has drawn. Returns the whole sequence once it has ended, that is unless it was cut off with
    /// `room` for more tokens.
    fn join(&mut self, drawn: Completion, room: usize) -> Option<Completion> {
        let whole = match self.begun.take() {
            None => drawn,
            Some(mut begun) => {
                let (old, new) = (begun.tokens.len() as f64, drawn.tokens.len() as f64);
                begun.entropy = (begun.entropy * old + drawn.entropy * new) / (old + new);
                begun.tokens.extend(drawn.tokens);
                begun.logprobs.extend(drawn.logprobs);
                Completion { finish: drawn.finish, ..begun }
            }
        };
        if whole.finish == Finish::Length && whole.tokens.len() < room {
            self.begun = Some(whole);
            return None;
        }
        Some(whole)
    }
}

/// What a round needs of the rest of the program.
pub struct Context<'a, B: Backend> {
    /// The model.
    pub decoder: &'a Decoder<B>,
    /// The rollout engine; idle before and after a round.
    pub engine: &'a mut Engine<B>,
    /// The executor.
    pub pool: &'a Pool,
    /// Text to tokens and back.
    pub codec: &'a Codec,
    /// Prompt and answer format, extraction rules, sampling.
    pub rules: &'a Rules,
    /// What the step began with; proposals that repeat it may be refused.
    pub buffers: &'a Buffers,
    /// Set by a signal: the round ends with [`Kind::Interrupted`].
    pub stop: &'a StopFlag,
}

/// Settings of generation, the same for every round of a run.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Prompt format.
    pub format: prompt::Format,
    /// Extraction rules.
    pub parse: parse::Rules,
    /// Number of probes per validated task, n.
    pub num_probes: usize,
    /// Sampling temperature.
    pub temperature: f32,
    /// Longest prompt, in tokens.
    pub max_prompt: usize,
    /// Longest prompt and completion together: the model's context.
    pub context: usize,
    /// Proposals that repeat the buffer.
    pub duplicates: Duplicates,
    /// Proposals that teach nothing.
    pub gate: GateConfig,
    /// Curated tasks for the solver.
    pub edge_cases: Buffers,
    /// Functions to draw ideas from: references without an execution.
    pub ground: Vec<Arc<Task>>,
    /// What completions are watched for.
    pub constraints: Constraints,
    /// How an induction answer's passed pairs count.
    pub induction_reward: InductionReward,
    /// Whether induction answers are also checked on the pairs that were shown.
    pub check_shown: bool,
    /// Longest completion of the proposer and of the solver, in tokens.
    pub max_response: [usize; 2],
    /// Most tokens that a step draws of a sequence; what is longer goes on in the next step. 0 for no limit.
    pub straggler_tokens: usize,
    /// Stop tokens by configuration, in the order of [`Config::ALL`].
    pub stop_tokens: Vec<Arc<[u32]>>,
}

/// Counts and times of a round.
#[derive(Debug, Default, Clone, Copy)]
pub struct RoundStats {
    /// Tokens sampled.
    pub sampled_tokens: u64,
    /// Seconds spent in the model.
    pub model_s: f64,
    /// Seconds in which there was nothing to sample and the executor was waited for.
    pub executor_wait_s: f64,
    /// Seconds in which a GPU had nothing to do between decoding steps, whatever the host was about.
    pub device_idle_s: f64,
    /// Programs sent to the executor.
    pub num_requests: u64,
}

/// Proposals and solutions of one step (or one pass of seeding).
#[derive(Debug, Default)]
pub struct Round {
    /// Proposals, in id order.
    pub proposals: Vec<Proposal>,
    /// Solutions, in id order.
    pub solves: Vec<Solve>,
    /// Counts and times.
    pub stats: RoundStats,
    /// Proposals from this id on belong to the next step: they are drawn and validated, but not probed yet.
    pub ahead_from: Option<u64>,
}

#[derive(Clone, Copy)]
enum Owner {
    Proposal(usize),
    Probe(usize, usize),
    Solve(usize),
}

/// The part of a running round that is not its result.
struct Traffic {
    owners: HashMap<u64, Owner>,
    outbox: VecDeque<(u64, Request)>,
    in_flight: usize,
    judge: Judge,
}

impl Round {
    /// Adds a proposal to make.
    pub fn propose(&mut self, id: u64, config: Config, shown: Shown, prompt: Arc<[u32]>) {
        self.proposals.push(Proposal {
            id,
            config,
            prompt,
            references: shown.references,
            composites: shown.composites,
            earlier: Earlier::default(),
            completion: None,
            format_ok: false,
            task: None,
            rejection: None,
            is_too_long: false,
            hits: Hits::default(),
            probes: Vec::new(),
            probe_prompt: None,
            draft: None,
            ungraded: 0,
        });
    }

    /// Adds a task to solve.
    pub fn solve(&mut self, id: u64, config: Config, task: Arc<Task>, edge_case: bool, prompt: Arc<[u32]>) {
        self.solves.push(Solve { config, task, edge_case, misleading: false, prompt, attempt: Attempt::new(id) });
    }

    /// Whether a proposal belongs to the next step.
    pub fn is_ahead(&self, p: &Proposal) -> bool {
        self.ahead_from.is_some_and(|first| p.id >= first)
    }

    /// Runs everything that was added to its end.
    ///
    /// # Errors
    /// When the engine or the executor fails, or on a stop signal.
    pub fn run<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<()> {
        let mut traffic = Traffic {
            owners: HashMap::new(),
            outbox: VecDeque::new(),
            in_flight: 0,
            judge: Judge::new(cx.rules.induction_reward, cx.rules.check_shown),
        };
        let num_own = self.proposals.partition_point(|p| !self.is_ahead(p));
        for i in 0..num_own {
            self.submit_proposal(i, cx, &mut traffic)?;
        }
        for (i, s) in self.solves.iter().enumerate().filter(|(_, s)| s.attempt.completion.is_none()) {
            traffic.owners.insert(s.attempt.id, Owner::Solve(i));
            cx.submit(s.attempt.id, s.config, &s.prompt, &s.attempt.earlier)?;
        }
        // Last, so that they fill the batch while what the step waits for comes to its end.
        for i in num_own..self.proposals.len() {
            self.submit_proposal(i, cx, &mut traffic)?;
        }
        let idle_s = cx.engine.device_idle_s();
        loop {
            if cx.stop.is_set() {
                cx.engine.clear();
                return Err(Error::new(Kind::Interrupted, "stopped by a signal"));
            }
            self.exchange(cx, &mut traffic)?;
            if !cx.engine.is_idle() {
                let start = Instant::now();
                let completions = cx.engine.step(cx.decoder)?;
                self.stats.model_s += start.elapsed().as_secs_f64();
                for completion in completions {
                    self.stats.sampled_tokens += completion.tokens.len() as u64;
                    self.on_completion(completion, cx, &mut traffic)?;
                }
            } else if traffic.in_flight > 0 || !traffic.outbox.is_empty() {
                let start = Instant::now();
                if let Ok((tag, verdict)) = cx.pool.verdicts().recv_timeout(EXECUTOR_WAIT) {
                    self.on_verdict(tag, &verdict?, cx, &mut traffic)?;
                }
                self.stats.executor_wait_s += start.elapsed().as_secs_f64();
            } else {
                self.stats.device_idle_s += cx.engine.device_idle_s() - idle_s;
                return Ok(());
            }
        }
    }

    /// Submits what is missing of a proposal: its own completion, or its probes'.
    fn submit_proposal<B: Backend>(&mut self, i: usize, cx: &mut Context<'_, B>, traffic: &mut Traffic) -> Result<()> {
        let p = &self.proposals[i];
        if p.completion.is_none() {
            traffic.owners.insert(p.id, Owner::Proposal(i));
            return cx.submit(p.id, p.config, &p.prompt, &p.earlier);
        }
        if p.task.is_some() && p.probes.is_empty() {
            return self.probe(i, cx, traffic);
        }
        let Some(prompt) = &p.probe_prompt else { return Ok(()) };
        let solver = Config { role: Role::Solve, ..p.config };
        for (j, probe) in p.probes.iter().enumerate().filter(|(_, probe)| probe.completion.is_none()) {
            traffic.owners.insert(probe.id, Owner::Probe(i, j));
            cx.submit(probe.id, solver, prompt, &probe.earlier)?;
        }
        Ok(())
    }

    /// Every completion of a finished round, with the place for what it hits.
    pub fn completions(&mut self) -> impl Iterator<Item = (&Completion, &mut Hits)> {
        let proposed = self.proposals.iter_mut().flat_map(|p| {
            std::iter::once((&p.completion, &mut p.hits)).chain(p.probes.iter_mut().map(Attempt::watched))
        });
        let solved = self.solves.iter_mut().map(|s| s.attempt.watched());
        proposed.chain(solved).filter_map(|(completion, hits)| Some((completion.as_ref()?, hits)))
    }

    /// Takes the probes' answers into the records of the tasks that are new in `step`, also where they were begun before;
    /// called once, after they have run and before anything holds the tasks.
    pub fn record_probes(&mut self, step: u64) {
        for p in &mut self.proposals {
            if let Some(task) = &mut p.task {
                let right = p.probes.iter().filter(|a| a.is_right()).count();
                let task = Arc::make_mut(task);
                task.step = step;
                task.record.observe(p.probes.len() as u32, right as u32);
            }
        }
    }

    /// Refuses proposals whose message misleads, and marks answers to tasks whose message does; called once, after
    /// [`Round::record_probes`].
    pub fn refuse_misleading(&mut self, gate: &GateConfig) {
        for p in &mut self.proposals {
            if p.task.as_ref().is_some_and(|t| gate.is_misleading(t.kind, &t.record)) {
                p.task = None;
                p.rejection = Some(gate::MISLEADING.to_owned());
            }
        }
        for answers in self.solves.chunk_by_mut(|a, b| a.attempt.id >> 8 == b.attempt.id >> 8) {
            let right = answers.iter().filter(|s| s.attempt.is_right()).count();
            let mut record = answers[0].task.record;
            record.observe(answers.len() as u32, right as u32);
            // What somebody has curated is hard at worst.
            let misleading = !answers[0].edge_case && gate.is_misleading(answers[0].config.kind, &record);
            answers.iter_mut().for_each(|s| s.misleading = misleading);
        }
    }

    /// Sends what the executor's queue takes and receives what has come back, without waiting.
    fn exchange<B: Backend>(&mut self, cx: &mut Context<'_, B>, traffic: &mut Traffic) -> Result<()> {
        while let Some((tag, request)) = traffic.outbox.pop_front() {
            if let Some(request) = cx.pool.try_submit(tag, request)? {
                traffic.outbox.push_front((tag, request));
                break;
            }
            traffic.in_flight += 1;
            self.stats.num_requests += 1;
        }
        while let Ok((tag, verdict)) = cx.pool.verdicts().try_recv() {
            self.on_verdict(tag, &verdict?, cx, traffic)?;
        }
        Ok(())
    }

    fn on_completion<B: Backend>(
        &mut self,
        completion: Completion,
        cx: &mut Context<'_, B>,
        traffic: &mut Traffic,
    ) -> Result<()> {
        let owner = traffic.owners.remove(&completion.id).expect("the engine returns what was submitted");
        match owner {
            Owner::Proposal(i) => {
                let p = &mut self.proposals[i];
                let room = cx.rules.room(p.config, p.prompt.len()).expect(FITS);
                if let Some(completion) = p.earlier.join(completion, room) {
                    self.on_proposal(i, completion, cx, traffic);
                }
            }
            Owner::Solve(i) => {
                let solve = &mut self.solves[i];
                let room = cx.rules.room(solve.config, solve.prompt.len()).expect(FITS);
                let Some(completion) = solve.attempt.earlier.join(completion, room) else { return Ok(()) };
                read_answer(&mut solve.attempt, completion, solve.config.kind, cx);
                let answers = [(solve.attempt.id, solve.attempt.answer.clone())];
                let group = solve.attempt.id >> 8;
                let grades = traffic.judge.submit(group, &solve.task, &answers, &mut traffic.outbox);
                traffic.owners.insert(solve.attempt.id, Owner::Solve(i));
                self.grade(grades, traffic);
            }
            Owner::Probe(i, j) => {
                let proposal = &mut self.proposals[i];
                let solver = Config { role: Role::Solve, ..proposal.config };
                let prompt = proposal.probe_prompt.as_ref().expect("probes have a prompt");
                let room = cx.rules.room(solver, prompt.len()).expect(FITS);
                let Some(completion) = proposal.probes[j].earlier.join(completion, room) else { return Ok(()) };
                read_answer(&mut proposal.probes[j], completion, proposal.config.kind, cx);
                if proposal.probes.iter().all(|p| p.completion.is_some()) {
                    let task = proposal.task.as_ref().expect("probes belong to a validated task");
                    let answers: Vec<_> = proposal.probes.iter().map(|p| (p.id, p.answer.clone())).collect();
                    for (j, probe) in proposal.probes.iter().enumerate() {
                        traffic.owners.insert(probe.id, Owner::Probe(i, j));
                    }
                    let grades = traffic.judge.submit(proposal.id >> 8, task, &answers, &mut traffic.outbox);
                    self.grade(grades, traffic);
                }
            }
        }
        Ok(())
    }

    fn on_proposal<B: Backend>(
        &mut self,
        i: usize,
        completion: Completion,
        cx: &Context<'_, B>,
        traffic: &mut Traffic,
    ) {
        let proposal = &mut self.proposals[i];
        let pieces = cx.codec.decode(&completion.tokens);
        let finished = completion.finish == Finish::Stop;
        proposal.completion = Some(completion);
        let source = proposal.references.first().map(Arc::as_ref);
        let (kind, composites) = (proposal.config.kind, &proposal.composites);
        let read = parse::proposal(cx.rules.format, kind, &pieces, finished, source, composites, cx.rules.parse);
        proposal.format_ok = read.format_ok;
        match read.draft {
            Err(reason) => proposal.rejection = Some(reason),
            Ok(draft) => {
                let varied = cx.rules.varied(&draft);
                let inputs = draft.inputs.iter().chain(&varied);
                let calls = inputs.map(|args| Call { args: args.clone(), expect: None }).collect();
                let request = Request { program: draft.program.clone(), calls, profile: Profile::Propose };
                traffic.owners.insert(proposal.id, Owner::Proposal(i));
                traffic.outbox.push_back((proposal.id, request));
                proposal.draft = Some(draft);
            }
        }
    }

    fn on_verdict<B: Backend>(
        &mut self,
        tag: u64,
        verdict: &Verdict,
        cx: &mut Context<'_, B>,
        traffic: &mut Traffic,
    ) -> Result<()> {
        traffic.in_flight -= 1;
        if traffic.judge.expects(tag) {
            let grades = traffic.judge.on_verdict(tag, verdict);
            self.grade(grades, traffic);
            return Ok(());
        }
        let Some(Owner::Proposal(i)) = traffic.owners.remove(&tag) else {
            return Err(Error::failure(format!("the executor answered the unknown request {tag}")));
        };
        self.on_validated(i, verdict, cx, traffic)
    }

    /// Turns a draft whose program ran into a task and admits its probes.
    fn on_validated<B: Backend>(
        &mut self,
        i: usize,
        verdict: &Verdict,
        cx: &mut Context<'_, B>,
        traffic: &mut Traffic,
    ) -> Result<()> {
        let proposal = &mut self.proposals[i];
        let draft = proposal.draft.take().expect("only drafts are validated");
        let refused = |outputs: Vec<String>| match cx.rules.refuses(&draft, verdict) {
            Some(reason) => Err(reason.to_owned()),
            None => Ok(outputs),
        };
        let outputs = match outputs(proposal.config.kind, verdict, draft.inputs.len()).and_then(refused) {
            Ok(outputs) => outputs,
            Err(reason) => {
                proposal.rejection = Some(reason);
                return Ok(());
            }
        };
        let normal_form = verdict.normal_form.clone().unwrap_or_default();
        let task = Arc::new(draft.into_task(outputs, normal_form, proposal.id >> 32));
        if cx.rules.duplicates == Duplicates::Refuse && cx.buffers.of(task.kind).has(&task) {
            proposal.rejection = Some(DUPLICATE.to_owned());
            return Ok(());
        }
        let solver = Config { kind: proposal.config.kind, role: Role::Solve };
        let prompt: Arc<[u32]> = cx.codec.encode(&prompt::solver(cx.rules.format, &task)).into();
        if cx.rules.room(solver, prompt.len()).is_none() {
            proposal.rejection = Some(TOO_LONG.to_owned());
            proposal.is_too_long = true;
            return Ok(());
        }
        proposal.task = Some(task);
        proposal.probe_prompt = Some(prompt);
        if self.is_ahead(&self.proposals[i]) { Ok(()) } else { self.probe(i, cx, traffic) }
    }

    /// Admits the probes of a task.
    fn probe<B: Backend>(&mut self, i: usize, cx: &mut Context<'_, B>, traffic: &mut Traffic) -> Result<()> {
        let proposal = &mut self.proposals[i];
        proposal.probes = (1..=cx.rules.num_probes as u64).map(|j| Attempt::new(proposal.id + j)).collect();
        proposal.ungraded = cx.rules.num_probes;
        if proposal.probes.is_empty() { Ok(()) } else { self.submit_proposal(i, cx, traffic) }
    }

    fn grade(&mut self, grades: Vec<Grade>, traffic: &mut Traffic) {
        for grade in grades {
            match traffic.owners.remove(&grade.id).expect("a graded answer has an owner") {
                Owner::Solve(i) => self.solves[i].attempt.grade = Some(grade),
                Owner::Probe(i, j) => {
                    self.proposals[i].probes[j].grade = Some(grade);
                    self.proposals[i].ungraded -= 1;
                }
                Owner::Proposal(_) => unreachable!("proposals are validated, not graded"),
            }
        }
    }
}

impl Proposal {
    /// Whether there is nothing left to sample or to grade of it.
    pub fn has_ended(&self, num_probes: usize) -> bool {
        let probed = self.ungraded == 0 && (!self.probes.is_empty() || num_probes == 0);
        self.completion.is_some() && (self.task.is_none() || probed)
    }

    /// Mean accuracy of the probes, the estimate of the success rate; `None` without a validated task.
    pub fn success_rate(&self) -> Option<f64> {
        if self.is_too_long {
            return Some(0.0);
        }
        if self.task.is_none() || self.probes.is_empty() {
            return None;
        }
        debug_assert_eq!(self.ungraded, 0, "read only after the round has ended");
        Some(self.probes.iter().map(Attempt::accuracy).sum::<f64>() / self.probes.len() as f64)
    }
}

impl<B: Backend> Context<'_, B> {
    fn submit(&mut self, id: u64, config: Config, prompt: &Arc<[u32]>, earlier: &Earlier) -> Result<()> {
        let room = self.rules.room(config, prompt.len()).expect(FITS);
        let (prompt, room) = match &earlier.begun {
            None => (prompt.clone(), room),
            Some(begun) => ([prompt, begun.tokens.as_slice()].concat().into(), room - begun.tokens.len()),
        };
        self.engine.submit(SampleRequest {
            id,
            prompt,
            max_new: if self.rules.straggler_tokens > 0 { room.min(self.rules.straggler_tokens) } else { room },
            stop: self.rules.stop_tokens[config.index()].clone(),
            temperature: self.rules.temperature,
            top_p: 1.0,
            top_k: 0,
        })
    }
}

fn read_answer<B: Backend>(attempt: &mut Attempt, completion: Completion, kind: TaskKind, cx: &Context<'_, B>) {
    let pieces: Vec<Piece> = cx.codec.decode(&completion.tokens);
    let finished = completion.finish == Finish::Stop;
    let read = parse::answer(cx.rules.format, kind, &pieces, finished);
    attempt.format_ok = read.format_ok;
    attempt.answer = read.answer;
    attempt.completion = Some(completion);
}

/// Why there is room after a prompt.
const FITS: &str = "only prompts that fit are submitted";

/// Why a proposal is refused that its buffer, or an earlier proposal of the step, has already.
pub const DUPLICATE: &str = "duplicate";

/// Why a proposal is refused that no solver could be asked about.
const TOO_LONG: &str = "the solver's prompt is too long";

impl Rules {
    /// Most tokens that may follow a prompt, or none when the prompt is too long.
    pub fn room(&self, config: Config, prompt_len: usize) -> Option<usize> {
        if prompt_len > self.max_prompt || prompt_len >= self.context {
            return None;
        }
        Some(self.max_response[usize::from(config.role == Role::Solve)].min(self.context - prompt_len))
    }

    /// Further inputs that the gate wants a proposal to be run on. Those of induction are varied enough.
    fn varied(&self, draft: &Draft) -> Vec<String> {
        let asks = self.gate.is_on() && matches!(draft.kind, TaskKind::Abduction | TaskKind::Deduction);
        if asks { gate::varied(&draft.inputs[0]) } else { Vec::new() }
    }

    /// Why the gate refuses a proposal that ran, if it does.
    fn refuses(&self, draft: &Draft, verdict: &Verdict) -> Option<&'static str> {
        if !self.gate.is_on() || draft.kind == TaskKind::Error {
            return None;
        }
        let varied = self.varied(draft);
        let inputs = draft.inputs.iter().chain(&varied);
        let values: Vec<(&str, &str)> = inputs
            .zip(&verdict.calls)
            .filter_map(|(input, outcome)| match outcome {
                Outcome::Value { text, .. } => Some((input.as_str(), text.as_str())),
                _ => None,
            })
            .collect();
        self.gate.refuses(&values)
    }
}

/// Outputs of a proposal each of whose `count` calls gave a value (error tasks: or an exception). The calls after these are
/// the gate's.
///
/// # Errors
/// Why it is no task.
pub fn outputs(kind: TaskKind, verdict: &Verdict, count: usize) -> Result<Vec<String>, String> {
    if let Some(rejection) = &verdict.rejection {
        return Err(rejection.to_string());
    }
    verdict
        .calls
        .iter()
        .take(count)
        .map(|outcome| match outcome {
            Outcome::Value { .. } if kind == TaskKind::Error => Ok("NoError".to_owned()),
            Outcome::Exception { class, .. } if kind == TaskKind::Error => Ok(class.clone()),
            Outcome::Value { text, .. } => Ok(text.clone()),
            other => Err(other.to_string()),
        })
        .collect()
}
