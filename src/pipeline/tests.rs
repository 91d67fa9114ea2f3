//! The published reference's defects, and what a re-implementation gets wrong, as far as the pipeline decides them: one test
//! each. Those of prompts, parsing, rewards, buffers, advantages and the executor have theirs beside the code.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use azr_tokenizer::Tokenizer;

use crate::base::rng::{Purpose, Rng};
use crate::compute::ops::MAX_STOPS;
use crate::exec::protocol::{Outcome, Rejection, Verdict};
use crate::exec::source::FunctionRule;
use crate::pipeline::carry::Carried;
use crate::pipeline::config::Config as RunConfig;
use crate::pipeline::generate::{Attempt, Round, Rules, Shown, sequence_id};
use crate::pipeline::judge::{Grade, Judge};
use crate::pipeline::prompts::Prompter;
use crate::pipeline::step;
use crate::pipeline::update::{Sample, merge, samples};
use crate::rollout::engine::{Completion, Finish};
use crate::selfplay::advantage::Baseline;
use crate::selfplay::buffer::{Buffers, ReferenceSampling};
use crate::selfplay::codec::Codec;
use crate::selfplay::config::{Duplicates, SelfPlayConfig};
use crate::selfplay::constraint::Constraints;
use crate::selfplay::gate::GateConfig;
use crate::selfplay::intrinsic::Seen;
use crate::selfplay::parse;
use crate::selfplay::prompt::Format;
use crate::selfplay::reward::{Extremes, InductionReward};
use crate::selfplay::task::{Config, Pair, Role, Task, TaskKind};
use crate::weights::model_files::ModelFiles;

fn task(kind: TaskKind, num_pairs: usize) -> Task {
    let pair = |i: usize| Pair { input: i.to_string(), output: format!("'{i}'") };
    Task {
        program: "def f(x):\n    return str(x)".into(),
        pairs: (0..num_pairs).map(pair).collect(),
        ..Task::identity(kind)
    }
}

fn verdict(calls: Vec<Outcome>) -> Verdict {
    Verdict { calls, ..Verdict::default() }
}

fn equal(matches: bool) -> Outcome {
    Outcome::Value { text: String::new(), matches: Some(matches) }
}

fn answers(texts: &[&str]) -> Vec<(u64, Option<String>)> {
    (1..).zip(texts.iter().map(|t| Some((*t).to_owned()))).collect()
}

#[test]
fn a_check_that_ends_in_any_other_way_is_wrong_and_is_not_left_out() {
    // The reference drops checks that raise something whose name lacks "error" from the mean.
    let task = task(TaskKind::Induction, 10);
    let stop = Outcome::Exception { class: "StopIteration".into(), message: String::new() };
    for bad in [stop, Outcome::TimeoutCpu, Outcome::Crash, Outcome::OutputTooLarge, equal(false)] {
        for (rule, expected) in [(InductionReward::Binary, 0.0), (InductionReward::Accuracy, 0.8)] {
            let (mut judge, mut outbox) = (Judge::new(rule, false), VecDeque::new());
            assert!(judge.submit(0, &task, &answers(&["def f(x): return 1"]), &mut outbox).is_empty());
            let (tag, _) = outbox.pop_front().expect("it is executed");
            let grades =
                judge.on_verdict(tag, &verdict(vec![equal(true), equal(true), bad.clone(), equal(true), equal(true)]));
            assert_eq!(grades.iter().map(|g| g.accuracy).collect::<Vec<_>>(), [expected], "{bad}");
        }
    }
    let (mut judge, mut outbox) = (Judge::new(InductionReward::AnyCorrect, false), VecDeque::new());
    judge.submit(0, &task, &answers(&["import os"]), &mut outbox);
    let rejected = Verdict { rejection: Some(Rejection::Policy("module os".into())), ..verdict(Vec::new()) };
    assert_eq!(judge.on_verdict(1, &rejected)[0].accuracy, 0.0);
}

#[test]
fn induction_is_judged_by_the_hidden_pairs_and_on_demand_by_those_shown() {
    let task = task(TaskKind::Induction, 10);
    let calls = |check_shown| {
        let (mut judge, mut outbox) = (Judge::new(InductionReward::Binary, check_shown), VecDeque::new());
        judge.submit(0, &task, &answers(&["def f(x): return 1"]), &mut outbox);
        outbox[0].1.calls.iter().map(|c| c.args.clone()).collect::<Vec<_>>().join("")
    };
    assert_eq!((calls(false), calls(true)), ("56789".to_owned(), "0123456789".to_owned()));
}

#[test]
fn answers_never_become_code() {
    // All three earned full marks from the reference.
    let abduction = task(TaskKind::Abduction, 1);
    let (mut judge, mut outbox) = (Judge::new(InductionReward::Binary, false), VecDeque::new());
    let hack = "0) or True or f(0";
    judge.submit(0, &abduction, &answers(&[hack, hack]), &mut outbox);
    let (tag, request) = outbox.pop_front().expect("it is executed");
    assert_eq!(
        (request.program.as_str(), request.calls.len()),
        (abduction.program.as_str(), 1),
        "equal answers run once"
    );
    assert_eq!((request.calls[0].args.as_str(), request.calls[0].expect.as_deref()), (hack, Some("'0'")));
    let grades = judge.on_verdict(tag, &verdict(vec![Outcome::BadArgs("not a literal".into())]));
    assert_eq!(grades.iter().map(|g| (g.id, g.accuracy)).collect::<Vec<_>>(), [(1, 0.0), (2, 0.0)]);
    // Nor again, when the same answer comes later; another task's answer is its own.
    let late = judge.submit(0, &abduction, &[(3, Some(hack.to_owned()))], &mut outbox);
    assert_eq!((late[0].id, late[0].accuracy, outbox.len()), (3, 0.0, 0));
    assert!(judge.submit(1, &abduction, &[(4, Some(hack.to_owned()))], &mut outbox).is_empty());
    assert!(judge.submit(1, &abduction, &[(5, Some(hack.to_owned()))], &mut outbox).is_empty());
    assert_eq!(outbox.pop_front().map(|(tag, _)| tag), Some(4));
    let grades = judge.on_verdict(4, &verdict(vec![equal(true)]));
    assert_eq!((grades.iter().map(|g| g.id).collect::<Vec<_>>(), outbox.len()), (vec![4, 5], 0));
    let deduction = task(TaskKind::Deduction, 1);
    let grades =
        judge.submit(0, &deduction, &answers(&["eval(gold_output)", "gold_output", "'0'", "\"0\""]), &mut outbox);
    assert_eq!(grades.iter().map(|g| g.accuracy).collect::<Vec<_>>(), [0.0, 0.0, 1.0, 1.0]);
}

fn completion(id: u64, num_tokens: usize) -> Completion {
    let (tokens, logprobs) = (vec![7; num_tokens], vec![-1.0; num_tokens]);
    Completion { id, tokens, logprobs, entropy: 1.0, finish: Finish::Stop }
}

fn graded(id: u64, accuracy: f64) -> Attempt {
    let grade = Some(Grade { id, accuracy, detail: String::new() });
    Attempt { id, completion: Some(completion(id, 3)), grade, ..Attempt::default() }
}

/// A round with four proposals and four solutions of each of two types; all solutions of deduction fail alike.
fn round() -> Round {
    let mut round = Round::default();
    let prompt: Arc<[u32]> = Arc::new([1, 2, 3]);
    for kind in [TaskKind::Abduction, TaskKind::Deduction] {
        for i in 0..4 {
            let (propose, solve) = (Config { kind, role: Role::Propose }, Config { kind, role: Role::Solve });
            let id = sequence_id(1, propose, i, 0);
            round.propose(id, propose, Shown::default(), prompt.clone());
            let p = round.proposals.last_mut().expect("just added");
            p.completion = Some(completion(id, 5 + i));
            p.format_ok = i != 3;
            if i > 0 {
                p.task = Some(Arc::new(task(kind, 1)));
                // Probes are in bad format, and count by their answers all the same.
                p.probes = (1..=4).map(|j| graded(id + j, f64::from(u8::from(j <= i as u64)))).collect();
                p.probe_prompt = Some(prompt.clone());
            }
            let id = sequence_id(1, solve, i, 0);
            round.solve(id, solve, Arc::new(task(kind, 1)), false, prompt.clone());
            let right = if kind == TaskKind::Deduction { 0.0 } else { (i % 2) as f64 };
            round.solves.last_mut().expect("just added").attempt = Attempt { format_ok: true, ..graded(id, right) };
        }
    }
    round
}

#[test]
fn proposals_earn_by_their_probes_which_are_not_trained_on() {
    let round = round();
    let config = SelfPlayConfig::default();
    let all = samples(&round, &Seen::default(), &config);
    assert_eq!(all.len(), 16, "one sample per prompt, no probe");
    let rewards = |config: Config| all.iter().filter(|s| s.config == config).map(|s| s.reward).collect::<Vec<_>>();
    let propose = Config { kind: TaskKind::Abduction, role: Role::Propose };
    // Invalid; solved by 1 and 2 of 4; valid in bad format.
    assert_eq!(rewards(propose), [-1.0, 0.75, 0.5, -1.0]);
    assert!(round.proposals[3].task.is_some(), "and stays a task");
    let with_probes = SelfPlayConfig { train_on_probes: true, ..config };
    assert_eq!(samples(&round, &Seen::default(), &with_probes).len(), 16 + 2 * 3 * 4);
}

#[test]
fn a_hit_of_a_constraint_costs_its_penalty() {
    let mut round = round();
    let config = SelfPlayConfig::default();
    let before: Vec<f64> = samples(&round, &Seen::default(), &config).iter().map(|s| s.reward).collect();
    round.proposals[1].hits.penalty = 0.5;
    round.solves[1].attempt.hits.penalty = 0.25;
    let penalised = [round.proposals[1].id, round.solves[1].attempt.id];
    for (sample, before) in samples(&round, &Seen::default(), &config).iter().zip(before) {
        let cost = penalised.iter().position(|id| *id == sample.id).map_or(0.0, |i| [0.5, 0.25][i]);
        assert_eq!(sample.reward, before - cost);
    }
    assert_eq!(round.completions().filter(|(_, h)| h.penalty > 0.0).count(), 2);
    assert_eq!(round.completions().count(), 16 + 2 * 3 * 4, "probes are watched, too");
}

#[test]
fn every_task_type_and_role_has_a_baseline_of_its_own() {
    let round = round();
    let all = samples(&round, &Seen::default(), &SelfPlayConfig::default());
    let configs: BTreeSet<Config> = all.iter().map(|s| s.config).collect();
    assert_eq!(configs.len(), 4);
    for which in configs {
        let of: Vec<_> = all.iter().filter(|s| s.config == which).collect();
        let weighted: f64 = of.iter().map(|s| s.advantage * s.completion.tokens.len() as f64).sum();
        assert!(weighted.abs() < 1e-9, "{which}: the token-weighted mean is 0");
        // One baseline for all would blame deduction's solutions, which are all alike.
        let alike = which == Config { kind: TaskKind::Deduction, role: Role::Solve };
        assert_eq!(of.iter().all(|s| s.advantage == 0.0), alike, "{which}");
    }
}

#[test]
fn a_global_baseline_blames_a_configuration_for_being_hard() {
    let round = round();
    let config = SelfPlayConfig { baseline: Baseline::Global, ..SelfPlayConfig::default() };
    let all = samples(&round, &Seen::default(), &config);
    let sum = |which: fn(&Config) -> bool| all.iter().filter(|s| which(&s.config)).map(|s| s.advantage).sum::<f64>();
    assert!(sum(|_| true).abs() < 1e-9, "the mean of all is 0");
    let alike = Config { kind: TaskKind::Deduction, role: Role::Solve };
    let of: Vec<f64> = all.iter().filter(|s| s.config == alike).map(|s| s.advantage).collect();
    assert!(of.iter().all(|a| *a == of[0] && *a < 0.0), "its answers are all wrong: {of:?}");
    assert!(sum(|c| c.kind == TaskKind::Abduction && c.role == Role::Solve) > 0.0);
}

#[test]
fn wrong_answers_count_for_less_and_bad_proposals_do_not() {
    let round = round();
    let with = |negative_weight: f64| {
        let config = SelfPlayConfig { negative_weight, ..SelfPlayConfig::default() };
        samples(&round, &Seen::default(), &config).iter().map(|s| (s.config.role, s.advantage)).collect::<Vec<_>>()
    };
    let (plain, less) = (with(1.0), with(0.25));
    let below = |role: Role| plain.iter().filter(|s| s.0 == role && s.1 < 0.0).count();
    assert!(below(Role::Solve) > 0 && below(Role::Propose) > 0);
    for ((role, plain), (_, less)) in plain.into_iter().zip(less) {
        let factor = if role == Role::Solve && plain < 0.0 { 0.25 } else { 1.0 };
        assert_eq!(less, factor * plain, "{role:?}");
    }
}

#[test]
fn a_trained_probe_is_measured_against_its_siblings() {
    let mut round = round();
    round.proposals.iter_mut().flat_map(|p| &mut p.probes).for_each(|probe| probe.format_ok = true);
    let config = SelfPlayConfig { train_on_probes: true, baseline: Baseline::Task, ..SelfPlayConfig::default() };
    let all = samples(&round, &Seen::default(), &config);
    for p in round.proposals.iter().filter(|p| p.task.is_some()) {
        let of = |id: u64| all.iter().find(|s| s.id == id).expect("probes are trained on").advantage;
        let advantages: Vec<f64> = p.probes.iter().map(|probe| of(probe.id)).collect();
        assert!(advantages.iter().sum::<f64>().abs() < 1e-9, "{advantages:?}");
        let mixed = p.success_rate().is_some_and(|rate| rate > 0.0 && rate < 1.0);
        assert_eq!(advantages.iter().any(|a| *a != 0.0), mixed, "{advantages:?}");
    }
}

#[test]
fn siblings_that_say_the_same_are_run_once_with_their_weights_added() {
    let mut round = round();
    for (i, probe) in round.proposals.iter_mut().flat_map(|p| &mut p.probes).enumerate() {
        probe.format_ok = true;
        // Ids give lengths that differ; the answers to one task shall be alike but for every fifth.
        probe.completion = Some(completion(0, if i % 5 == 4 { 3 } else { 2 }));
    }
    let config = SelfPlayConfig { train_on_probes: true, baseline: Baseline::Task, ..SelfPlayConfig::default() };
    let all = samples(&round, &Seen::default(), &config);
    let merged = merge(all.iter().zip((1..).map(|i| i as f32)));
    assert_eq!(merged.iter().map(|m| m.count).sum::<usize>(), all.len(), "none is lost");
    assert_eq!(merged.iter().map(|m| m.weight).sum::<f32>(), (1..=all.len()).sum::<usize>() as f32);
    assert!(merged.iter().any(|m| m.count > 1) && merged.len() < all.len());
    // What differs in task, configuration, advantage or text stays apart.
    let key = |s: &Sample<'_>| (s.config, s.id >> 8, s.advantage.to_bits(), s.completion.tokens.clone());
    let apart: BTreeSet<_> = all.iter().map(key).collect();
    assert_eq!(merged.len(), apart.len());
}

#[test]
fn what_misleads_is_refused_and_not_trained_on() {
    let mut round = Round::default();
    let prompt: Arc<[u32]> = Arc::new([1, 2, 3]);
    let (kind, gate) = (TaskKind::Induction, GateConfig { misleading: 0.5, ..GateConfig::default() });
    let (propose, solve) = (Config { kind, role: Role::Propose }, Config { kind, role: Role::Solve });
    for i in 0..2 {
        let id = sequence_id(1, propose, i, 0);
        round.propose(id, propose, Shown::default(), prompt.clone());
        let p = round.proposals.last_mut().expect("just added");
        (p.completion, p.format_ok) = (Some(completion(id, 5)), true);
        p.task = Some(Arc::new(task(kind, 4)));
        // The first is solved once, the second three times.
        p.probes = (1..=4).map(|j| graded(id + j, f64::from(u8::from(j <= 1 + 2 * i as u64)))).collect();
        p.probe_prompt = Some(prompt.clone());
        for answer in 0..4 {
            let id = sequence_id(1, solve, i, answer);
            round.solve(id, solve, Arc::new(task(kind, 4)), false, prompt.clone());
            let right = f64::from(u8::from(answer <= 2 * i));
            round.solves.last_mut().expect("just added").attempt = graded(id, right);
        }
    }
    round.record_probes(1);
    round.refuse_misleading(&gate);
    assert_eq!(round.proposals[0].rejection.as_deref(), Some("gate: the message misleads"));
    assert!(round.proposals[0].task.is_none() && round.proposals[1].task.is_some());
    let config = SelfPlayConfig { train_on_probes: true, num_answers: 4, ..SelfPlayConfig::default() };
    let all = samples(&round, &Seen::default(), &config);
    let rewards: Vec<f64> = all.iter().filter(|s| s.config == propose).map(|s| s.reward).collect();
    assert_eq!(rewards, [-1.0, 0.25]);
    let trained = |index: u64| all.iter().filter(|s| s.config == solve && s.id >> 8 & 0xffff == index).count();
    // Answers and probes of the second task; neither of the first.
    assert_eq!(all.iter().filter(|s| s.config == solve).count(), 8);
    assert_eq!((trained(0), trained(1)), (0, 4 + 4));
    // A curated task is trusted, however hard.
    round.solves.iter_mut().for_each(|s| s.edge_case = true);
    round.refuse_misleading(&gate);
    assert!(round.solves.iter().all(|s| !s.misleading));
}

#[test]
fn what_is_carried_goes_on_while_it_fits() {
    let codec = Codec::new(Arc::new(Tokenizer::embedded()), Format::Compact, None).expect("the embedded vocabulary");
    let mut round = round();
    // Nothing of one is there, half of another has been drawn, a proposal waits for a probe.
    round.solves[0].attempt = Attempt { id: round.solves[0].attempt.id, ..Attempt::default() };
    let half = &mut round.solves[1].attempt;
    *half = Attempt { id: half.id, ..Attempt::default() };
    half.earlier.begun = Some(Completion { finish: Finish::Length, ..completion(half.id, 20) });
    round.proposals[1].probes.pop();
    round.proposals[1].probes.push(Attempt::default());
    round.proposals[1].ungraded = 1;
    let carried = Carried::take(&mut round, 4);
    assert_eq!((carried.len(), round.proposals.len(), round.solves.len()), (3, 7, 6));
    let (again, dropped) = carried.clone().into_round(&rules(&codec, 512), u64::MAX);
    assert_eq!((again.proposals.len(), again.solves.len(), dropped), (1, 2, 0));
    assert_eq!(again.solves[1].attempt.earlier.stale, 20);
    assert_eq!(again.proposals[0].earlier.stale, 6, "its own completion, of this step's weights");
    let shorter = Rules { max_response: [64, 20], ..rules(&codec, 512) };
    assert_eq!(carried.clone().into_round(&shorter, u64::MAX).1, 1, "what is longer than it may be");
    let shorter = |propose| Rules { max_response: [propose, 64], ..rules(&codec, 512) };
    assert_eq!(carried.clone().into_round(&shorter(6), u64::MAX).1, 0, "what has ended fits as it is");
    assert_eq!(carried.clone().into_round(&shorter(5), u64::MAX).1, 1, "or does not");
    assert_eq!(carried.clone().into_round(&rules(&codec, 2), u64::MAX).1, 3, "whose prompts are too long");
    let (again, dropped) = carried.into_round(&rules(&codec, 512), again.solves[1].attempt.id);
    assert_eq!((again.proposals.len(), again.solves.len(), dropped), (1, 1, 1), "whose id the step gives out again");
}

fn rules(codec: &Codec, max_prompt: usize) -> Rules {
    let stop: Arc<[u32]> = codec.special_ids(&["<|end|>"]).collect();
    Rules {
        format: Format::Compact,
        parse: parse::Rules { function_rule: FunctionRule::Any, seeding: false },
        num_probes: 4,
        temperature: 1.0,
        max_prompt,
        context: 512,
        duplicates: Duplicates::Allow,
        gate: GateConfig::default(),
        edge_cases: Buffers::new(1),
        ground: Vec::new(),
        constraints: Constraints::default(),
        induction_reward: InductionReward::Binary,
        check_shown: false,
        max_response: [64, 64],
        straggler_tokens: 0,
        stop_tokens: Config::ALL.map(|_| stop.clone()).into(),
    }
}

#[test]
fn a_prompt_that_is_too_long_loses_references_and_not_the_batch() {
    let codec = Codec::new(Arc::new(Tokenizer::embedded()), Format::Compact, None).expect("the embedded vocabulary");
    let mut buffers = Buffers::new(99);
    for i in 0..12 {
        let long =
            format!("def f(x):\n    return {}", (0..=i).map(|n| format!("x + {n}")).collect::<Vec<_>>().join(" + "));
        buffers.push(Arc::new(Task { program: long, ..task(TaskKind::Deduction, 1) }));
    }
    let config = SelfPlayConfig::default();
    let proposed = |max_prompt| {
        let rules = rules(&codec, max_prompt);
        let prompter = Prompter { codec: &codec, rules: &rules, config: &config, buffers: &buffers, seed: 3 };
        let mut round = Round::default();
        let left_out = prompter.proposals(&mut round, TaskKind::Deduction, 1, 8);
        assert!(round.proposals.iter().all(|p| p.prompt.len() <= max_prompt));
        let references: Vec<usize> = round.proposals.iter().map(|p| p.references.len()).collect();
        (left_out, references)
    };
    assert_eq!(proposed(500), (0, vec![6; 8]));
    let (left_out, references) = proposed(120);
    assert!(left_out == 0 && references.iter().all(|n| *n < 6) && references.iter().any(|n| *n > 0), "{references:?}");
    assert_eq!(proposed(1).0, 8, "counted when not even a bare prompt fits");
    // One that is longer than a prompt may be costs itself alone.
    let huge =
        Task { program: format!("def f(x):\n    return '{}'", "a b ".repeat(2000)), ..task(TaskKind::Deduction, 1) };
    (0..90).for_each(|_| buffers.push(Arc::new(Task::identity(TaskKind::Deduction))));
    buffers.push(Arc::new(huge));
    let rules = rules(&codec, 300);
    let config = SelfPlayConfig { num_references: 64, ..config };
    let prompter = Prompter { codec: &codec, rules: &rules, config: &config, buffers: &buffers, seed: 3 };
    let mut round = Round::default();
    prompter.proposals(&mut round, TaskKind::Deduction, 1, 8);
    assert!(round.proposals.iter().all(|p| p.references.len() > 3), "as many as fit");
}

#[test]
fn a_task_that_no_solver_could_be_asked_about_counts_as_solved_by_none() {
    let mut round = round();
    let p = &mut round.proposals[1];
    (p.task, p.is_too_long, p.probes) = (None, true, Vec::new());
    let rewards = |propose_reward| -> Vec<f64> {
        let config = SelfPlayConfig { propose_reward, ..SelfPlayConfig::default() };
        samples(&round, &Seen::default(), &config).iter().map(|s| s.reward).collect()
    };
    // The first has no task for another reason.
    assert_eq!((rewards(Extremes::Zero)[0], rewards(Extremes::Zero)[1]), (-1.0, 0.0));
    assert_eq!((rewards(Extremes::MinusHalf)[0], rewards(Extremes::MinusHalf)[1]), (-1.0, -0.5));
}

#[test]
fn induction_programs_come_from_abduction_and_deduction_alike() {
    let mut buffers = Buffers::new(99);
    for (kind, name) in [(TaskKind::Abduction, "a"), (TaskKind::Deduction, "d"), (TaskKind::Induction, "i")] {
        buffers.push(Arc::new(Task { message: name.into(), ..task(kind, 1) }));
    }
    let (mut rng, uniform) = (Rng::new(1, Purpose::Test, 0, 0), ReferenceSampling::Uniform);
    let drawn: BTreeSet<String> =
        (0..64).map(|_| buffers.induction_source(&mut rng, uniform).expect("there are two").message.clone()).collect();
    assert_eq!(drawn.into_iter().collect::<Vec<_>>(), ["a", "d"]);
    assert!(Buffers::new(1).induction_source(&mut rng, uniform).is_none());
}

#[test]
fn the_embedded_models_samples_decode_on_the_device() {
    let model = ModelFiles::embedded().expect("it is there");
    let codec = Codec::new(Arc::new(model.tokenizer.clone()), Format::Compact, None).expect("the embedded vocabulary");
    let rules = step::rules(&RunConfig::default(), &model, Format::Compact, &codec);
    assert!(rules.stop_tokens.iter().all(|stops| (1..=MAX_STOPS).contains(&stops.len())), "{:?}", rules.stop_tokens);
}
