//! Buffers of validated tasks, one per task type. A full buffer drops its oldest task.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::base::rng::Rng;
use crate::selfplay::gate::GateConfig;
use crate::selfplay::task::{Task, TaskKind};

/// How references are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReferenceSampling {
    /// All tasks alike.
    Uniform,
    /// In proportion to the step that proposed them, plus 1.
    Recent,
    /// In proportion to the solver's failures at them ([`Record::failure`](crate::selfplay::task::Record::failure)), programs of induction proposals too.
    Adversarial,
}

/// How solver tasks are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskSampling {
    /// Tasks of the last step first, the rest from all.
    MaxNew,
    /// Half from the last step, the rest from all.
    HalfNew,
    /// From all alike.
    Uniform,
    /// In proportion to what the solver can learn ([`Record::learnability`](crate::selfplay::task::Record::learnability)): tasks
    /// that it solves now and then, and those that it has not met.
    Learnable,
}

/// Answers to tasks that were drawn from buffers, and right ones among them, by the tasks' addresses.
pub type Answers = HashMap<*const Task, (u32, u32)>;

/// Tasks of one type, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Buffer {
    tasks: VecDeque<Arc<Task>>,
    known: HashMap<String, usize>,
    capacity: usize,
}

impl Buffer {
    /// An empty buffer for at most `capacity` tasks.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "a buffer holds something");
        Buffer { tasks: VecDeque::new(), known: HashMap::new(), capacity }
    }

    /// Stores a task; the oldest makes room.
    pub fn push(&mut self, task: Arc<Task>) {
        if self.tasks.len() == self.capacity
            && let Some(oldest) = self.tasks.pop_front()
            && let likeness = oldest.likeness()
            && let Some(count) = self.known.get_mut(&likeness)
        {
            *count -= 1;
            if *count == 0 {
                self.known.remove(&likeness);
            }
        }
        *self.known.entry(task.likeness()).or_insert(0) += 1;
        self.tasks.push_back(task);
    }

    /// Whether a task like this is there ([`Task::likeness`]).
    pub fn has(&self, task: &Task) -> bool {
        self.known.contains_key(&task.likeness())
    }

    /// Number of tasks.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Tasks, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Task>> {
        self.tasks.iter()
    }

    /// Draws `count` different references, or all there are.
    pub fn references(&self, rng: &mut Rng, count: usize, sampling: ReferenceSampling) -> Vec<Arc<Task>> {
        let count = count.min(self.len());
        let weight: fn(&Arc<Task>) -> f64 = match sampling {
            ReferenceSampling::Uniform => {
                return rng.distinct(self.len(), count).into_iter().map(|i| self.tasks[i].clone()).collect();
            }
            ReferenceSampling::Recent => |t| t.step as f64 + 1.0,
            ReferenceSampling::Adversarial => |t| t.record.failure(),
        };
        let weights = self.tasks.iter().map(weight).collect();
        distinct_by_weight(rng, weights, count).into_iter().map(|i| self.tasks[i].clone()).collect()
    }

    /// Draws `count` tasks for the solver at `step`: different ones as far as they go, then again from all. Those that the
    /// gate withholds are passed over, unless all are.
    pub fn solver_tasks(
        &self,
        rng: &mut Rng,
        count: usize,
        sampling: TaskSampling,
        step: u64,
        gate: &GateConfig,
    ) -> Vec<Arc<Task>> {
        let mut open: Vec<&Arc<Task>> = self.tasks.iter().filter(|t| !gate.withholds(t)).collect();
        if open.is_empty() {
            open.extend(&self.tasks);
        }
        if open.is_empty() {
            return Vec::new();
        }
        if sampling == TaskSampling::Learnable {
            let weights: Vec<f64> = open.iter().map(|t| t.record.learnability()).collect();
            let mut drawn = Vec::with_capacity(count);
            while drawn.len() < count {
                let more = (count - drawn.len()).min(open.len());
                drawn.extend(distinct_by_weight(rng, weights.clone(), more));
            }
            return drawn.into_iter().map(|i| open[i].clone()).collect();
        }
        // Tasks come in the order of their steps, so the new ones are the last.
        let num_new = open.iter().rev().take_while(|t| t.step + 1 >= step).count();
        let wanted = match sampling {
            TaskSampling::MaxNew => count,
            TaskSampling::HalfNew => count / 2,
            TaskSampling::Uniform | TaskSampling::Learnable => 0,
        };
        let first_new = open.len() - num_new;
        let mut drawn: Vec<usize> =
            rng.distinct(num_new, wanted.min(num_new)).into_iter().map(|i| first_new + i).collect();
        while drawn.len() < count {
            let more = (count - drawn.len()).min(open.len());
            drawn.extend(rng.distinct(open.len(), more));
        }
        drawn.into_iter().map(|i| open[i].clone()).collect()
    }

    /// Number of tasks that the gate calls too easy.
    pub fn num_too_easy(&self, gate: &GateConfig) -> usize {
        self.tasks.iter().filter(|t| gate.is_too_easy(&t.record)).count()
    }
}

/// Draws `count` different indices in proportion to their weights, which are above 0.
fn distinct_by_weight(rng: &mut Rng, mut weights: Vec<f64>, count: usize) -> Vec<usize> {
    let draw = |_| {
        let i = rng.weighted(&weights);
        weights[i] = 0.0;
        i
    };
    (0..count).map(draw).collect()
}

/// The buffers of all task types.
#[derive(Debug, Clone)]
pub struct Buffers {
    by_kind: [Buffer; 4],
}

impl Buffers {
    /// Empty buffers.
    pub fn new(capacity: usize) -> Self {
        Buffers { by_kind: std::array::from_fn(|_| Buffer::new(capacity)) }
    }

    /// The buffer of a task type.
    pub fn of(&self, kind: TaskKind) -> &Buffer {
        &self.by_kind[kind as usize]
    }

    /// Stores a task in its buffer.
    pub fn push(&mut self, task: Arc<Task>) {
        self.by_kind[task.kind as usize].push(task);
    }

    /// Takes the answers of one step into the records of their tasks.
    pub fn observe(&mut self, answers: &Answers) {
        for task in self.by_kind.iter_mut().flat_map(|b| &mut b.tasks) {
            if let Some((tries, right)) = answers.get(&Arc::as_ptr(task)) {
                Arc::make_mut(task).record.observe(*tries, *right);
            }
        }
    }

    /// All tasks, buffer after buffer, each oldest first: pushed again in this order, they give equal buffers.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Task>> {
        self.by_kind.iter().flat_map(Buffer::iter)
    }

    /// A program for an induction proposer: from the union of abduction and deduction, uniformly unless the sampling is
    /// adversarial.
    pub fn induction_source(&self, rng: &mut Rng, sampling: ReferenceSampling) -> Option<Arc<Task>> {
        let (a, d) = (self.of(TaskKind::Abduction), self.of(TaskKind::Deduction));
        let total = a.len() + d.len();
        (total > 0).then(|| {
            let i = if sampling == ReferenceSampling::Adversarial {
                rng.weighted(&a.iter().chain(d.iter()).map(|t| t.record.failure()).collect::<Vec<_>>())
            } else {
                rng.below(total)
            };
            if i < a.len() { a.tasks[i].clone() } else { d.tasks[i - a.len()].clone() }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Purpose;

    fn task(i: u64) -> Arc<Task> {
        let mut task = Task::identity(TaskKind::Deduction);
        task.step = i;
        task.normal_form = format!("form {}", i % 3);
        task.program = i.to_string();
        Arc::new(task)
    }

    fn rng() -> Rng {
        Rng::new(3, Purpose::Test, 0, 0)
    }

    #[test]
    fn a_full_buffer_drops_the_oldest() {
        let mut buffer = Buffer::new(4);
        (0..6).for_each(|i| buffer.push(task(i)));
        assert_eq!(buffer.iter().map(|t| t.step).collect::<Vec<_>>(), [2, 3, 4, 5]);
        assert!(buffer.has(&task(0)) && !buffer.has(&Task::identity(TaskKind::Deduction)));
        let mut one = Buffer::new(1);
        (0..2).for_each(|i| one.push(task(i)));
        assert!(!one.has(&task(0)) && one.has(&task(1)));
    }

    #[test]
    fn references_are_different_tasks() {
        let mut buffer = Buffer::new(99);
        (0..20).for_each(|i| buffer.push(task(i)));
        for sampling in [ReferenceSampling::Uniform, ReferenceSampling::Recent, ReferenceSampling::Adversarial] {
            let mut steps: Vec<u64> = buffer.references(&mut rng(), 6, sampling).iter().map(|t| t.step).collect();
            steps.sort_unstable();
            steps.dedup();
            assert_eq!(steps.len(), 6);
        }
        assert_eq!(buffer.references(&mut rng(), 99, ReferenceSampling::Recent).len(), 20);
    }

    #[test]
    fn adversarial_references_are_what_the_solver_fails() {
        let mut buffers = Buffers::new(99);
        for i in 0..20 {
            let mut task = Task::clone(&task(i));
            task.record.observe(8, if i < 10 { 8 } else { 0 });
            buffers.push(Arc::new(task));
        }
        let mut rng = rng();
        let mut failed = |sampling| {
            let (mut references, mut sources) = (0, 0);
            for _ in 0..200 {
                let drawn = buffers.of(TaskKind::Deduction).references(&mut rng, 1, sampling);
                references += usize::from(drawn[0].step >= 10);
                let source = buffers.induction_source(&mut rng, sampling).expect("there are 20");
                sources += usize::from(source.step >= 10);
            }
            [references, sources]
        };
        // Nine tenths of the weight are theirs.
        assert!(failed(ReferenceSampling::Adversarial).iter().all(|n| (165..195).contains(n)));
        assert!(failed(ReferenceSampling::Uniform).iter().all(|n| (75..125).contains(n)));
    }

    #[test]
    fn learnable_tasks_are_drawn_most_often_and_each_once_while_they_go_round() {
        let mut buffer = Buffer::new(99);
        for i in 0..20 {
            let mut task = Task::clone(&task(i));
            task.record.observe(38, if i < 10 { 19 } else { 0 });
            buffer.push(Arc::new(task));
        }
        let (mut rng, off) = (rng(), GateConfig::default());
        let mut draw = |count| buffer.solver_tasks(&mut rng, count, TaskSampling::Learnable, 20, &off);
        let learnable = (0..200).filter(|_| draw(1)[0].step < 10).count();
        // 1 / 8 against 39 / 64,000.
        assert!((190..=200).contains(&learnable), "{learnable}");
        let mut steps: Vec<u64> = draw(40).iter().map(|t| t.step).collect();
        steps.sort_unstable();
        assert_eq!(steps, (0..40).map(|i| i / 2).collect::<Vec<u64>>());
    }

    #[test]
    fn new_tasks_come_first_and_the_new_are_still_new_after_eviction() {
        let mut buffer = Buffer::new(30);
        for step in 0..20 {
            for _ in 0..3 {
                buffer.push(task(step));
            }
        }
        let off = GateConfig::default();
        // Frozen "newest" entries were a defect of the reference: here they are those of the last step.
        let drawn = buffer.solver_tasks(&mut rng(), 8, TaskSampling::MaxNew, 20, &off);
        assert_eq!((drawn.len(), drawn.iter().filter(|t| t.step == 19).count() >= 3), (8, true));
        let all: Vec<u64> =
            buffer.solver_tasks(&mut rng(), 3, TaskSampling::MaxNew, 20, &off).iter().map(|t| t.step).collect();
        assert_eq!(all, [19, 19, 19]);
        assert_eq!(buffer.solver_tasks(&mut rng(), 100, TaskSampling::Uniform, 20, &off).len(), 100);
        assert!(Buffer::new(1).solver_tasks(&mut rng(), 3, TaskSampling::MaxNew, 1, &off).is_empty());
    }

    #[test]
    fn what_is_always_right_is_drawn_no_more_while_there_is_something_else() {
        let gate = GateConfig { too_easy: 2, ..GateConfig::default() };
        let mut buffers = Buffers::new(9);
        (0..4).for_each(|i| buffers.push(task(i)));
        let address = |buffers: &Buffers, i: usize| {
            Arc::as_ptr(buffers.of(TaskKind::Deduction).iter().nth(i).expect("one of four"))
        };
        let drawn = |buffers: &Buffers, gate: &GateConfig| {
            let tasks = buffers.of(TaskKind::Deduction).solver_tasks(&mut rng(), 40, TaskSampling::Uniform, 9, gate);
            let mut steps: Vec<u64> = tasks.iter().map(|t| t.step).collect();
            steps.sort_unstable();
            steps.dedup();
            steps
        };
        for (right, left) in [(1, vec![0, 1, 2, 3]), (1, vec![0, 1, 3]), (0, vec![0, 1, 2, 3])] {
            buffers.observe(&Answers::from([(address(&buffers, 2), (1, right)), (address(&buffers, 3), (3, 2))]));
            assert_eq!(drawn(&buffers, &gate), left);
            assert_eq!(buffers.of(TaskKind::Deduction).num_too_easy(&gate), 4 - left.len());
            assert_eq!(drawn(&buffers, &GateConfig::default()), [0, 1, 2, 3], "off by default");
        }
        for _ in 0..2 {
            buffers.observe(&(0..4).map(|i| (address(&buffers, i), (1, 1))).collect());
        }
        assert_eq!(drawn(&buffers, &gate), [0, 1, 2, 3], "too easy is better than nothing");
    }
}
