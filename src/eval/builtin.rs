//! The built-in suite: tasks of the three types at four levels, of programs that the embedded model's pre-training has not
//! seen: each is built over a template that is not in the generator's grammar, and a test proves by normalised syntax that
//! no program of the pre-training is among them. Values and sub-expressions are the grammar's, so that the vocabulary is
//! known and the structure is new.
//!
//! Beside it, `grammar` holds the generator's own programs from indices that pre-training leaves out: easier, because small
//! programs come back under many indices.
//!
//! The suites depend on nothing but the number of tasks asked for: a smaller one is the beginning of a larger one.

use std::collections::HashSet;

use super::suites::{Item, Question};
use crate::base::rng::{Purpose, Rng};
use crate::error::{Error, Result};
use crate::exec::normal_form::normal_form;
use crate::exec::pool::Pool;
use crate::pretrain::corpus::{Executed, HELD_OUT_EVERY, execute_programs, inputs, numbered};
use crate::pretrain::generator::{self, Program};
use crate::selfplay::prompt::NUM_INDUCTION_INPUTS;
use crate::selfplay::task::TaskKind;

/// Name of the suite.
pub const NAME: &str = "builtin";
/// Name of the suite of the generator's own programs.
pub const GRAMMAR: &str = "grammar";
/// Task types.
pub const KINDS: [TaskKind; 3] = [TaskKind::Deduction, TaskKind::Abduction, TaskKind::Induction];
/// Seed of programs and inputs; no other stream of random numbers has its purpose with it.
const SEED: u64 = 0x6865_6c64_6f75_7421;
/// Programs that are drawn and run at a time.
const CHUNK: u64 = 256;
/// Levels of the generator.
const GRAMMAR_LEVELS: usize = 3;
/// Seed of the embedded model's pre-training.
const PRETRAINING_SEED: u64 = 1;
/// Chunks after which a level that has not filled is an error.
const MAX_CHUNKS: u64 = 64;
/// Different outputs that ten inputs must have at least: fewer can be guessed.
const MIN_OUTPUTS: usize = 3;

/// Templates by level, as (code, description): the grammar's expressions with numbers and slices that it has not; other
/// expressions; steps and branches; loops. Holes are those of the generator's grammar.
const TEMPLATES: [&[(&str, &str)]; 4] = [
    &[
        ("return $I + 6", "$I plus 6"),
        ("return $I - 8", "$I minus 8"),
        ("return $I * 4", "$I times 4"),
        ("return $I // 6", "$I divided by 6"),
        ("return $I % 9", "$I modulo 9"),
        ("return max($i, 6)", "larger of $i and 6"),
        ("return sum($L) + 6", "sum of $L plus 6"),
        ("return len($S) * 4", "length of $S times 4"),
        ("return $d.get('dog', 6) + len($d)", "value of 'dog' in $d or 6, plus size of $d"),
        ("return [v + 6 for v in $L]", "each of $L plus 6"),
        ("return [v * 4 for v in $L]", "each of $L times 4"),
        ("return [v for v in $L if v > 6]", "$L that are above 6"),
        ("return [v for v in $L if v < 8]", "$L that are below 8"),
        ("return $L[::3]", "every third of $L"),
        ("return $L[1:-1]", "all but the first and last of $L"),
        ("return $L[3:]", "all from the fourth of $L"),
        ("return $l + [6]", "$l with 6 added"),
        ("return $S[::3]", "every third of $S"),
        ("return $S[1:-1]", "all but the first and last of $S"),
        ("return $S[3:]", "all from the fourth of $S"),
        ("return $S[:4]", "first 4 of $S"),
        ("return $S + 'z'", "$S followed by 'z'"),
        ("return $s * 4", "$s 4 times"),
        ("return $s.replace('a', 'z')", "$s with 'z' for 'a'"),
        ("return [w + 'z' for w in $W]", "each of $W followed by 'z'"),
        ("return $W[::3]", "every third of $W"),
        ("return {k: v + 6 for k, v in $d.items()}", "$d with values plus 6"),
    ],
    &[
        ("return max($L) - min($l)", "largest of $L minus smallest of $l"),
        ("return sum($L) - len($l)", "sum of $L minus length of $l"),
        ("return $S[1:] + $s[0]", "$S without the first letter, then the first of $s"),
        ("return $S.upper() + $s[::-1]", "$S in upper case followed by $s reversed"),
        ("return sorted($L)[$x]", "$x of $L sorted"),
        ("return $i * $i + $k", "$i squared plus $k"),
        ("return $i * $k - $i // $q", "$i times $k minus $i divided by $q"),
        ("return len($S) * $k + $s.count($c)", "length of $S times $k plus how often $c is in $s"),
        ("return [v - $i for v in $L]", "each of $L minus $i"),
        ("return [$k - v for v in $L]", "$k minus each of $L"),
        ("return {w: w.upper() for w in $W}", "$W in upper case by word"),
        ("return $l[-1] - $l[0] + $k", "last of $l minus first of $l plus $k"),
        ("return sum($d.values()) - len($d) * $k", "sum of the values of $d minus its size times $k"),
        ("return [v for v in $L if v != $l[0]]", "$L that are not the first of $l"),
        ("return $S.replace($c, '')", "$S without $c"),
        ("return $l[:len($l) // 2] + [$k]", "first half of $l with $k added"),
        ("return [w + str(len(w)) for w in $W]", "each of $W followed by its length"),
        ("return $g.join($W) + str(len($w))", "$W joined by $g followed by the size of $w"),
    ],
    &[
        ("$a = max($L)\nreturn [$a - v for v in $l]", "each of $l below the largest of $L"),
        ("$a = len($s) // 2\nreturn $s[$a:] + $s[:$a]", "halves of $s swapped"),
        ("$a = len($s) // 2\nreturn $s[:$a] + $g + $s[$a:]", "$s with $g in the middle"),
        ("$a = sum($L)\nif $a > $j:\n    return $a - $j\nreturn $a", "sum of $L, $j less if above $j"),
        ("$a = sorted($L)\nreturn $a[-1] - $a[0] + $k", "spread of $L plus $k"),
        ("if len($l) > $q:\n    return $l[:$q]\nreturn $l + [$k]", "first $q of $l if longer, else with $k added"),
        (
            "$a = $i % $q\nif $a == 0:\n    return $i // $q\nreturn $i + $a",
            "$i divided by $q if even so, else plus the rest",
        ),
        ("$a = $S.upper()\nreturn $a + str(len($a))", "$S in upper case followed by its length"),
        ("$a = [len(w) for w in $W]\nreturn max($a) - min($a) + $k", "longest minus shortest length in $W plus $k"),
        ("if $s == $s[::-1]:\n    return len($s)\nreturn -len($s) - $k", "length of $s, negative if no palindrome"),
        ("$a = $l[0]\n$l[0] = $l[-1]\n$l[-1] = $a + $k\nreturn $l", "$l with its ends swapped, the last plus $k"),
        ("$a = $S\nif $c in $a:\n    return $a.replace($c, $g)\nreturn $a + $c", "$S with $g for $c, or with $c added"),
        ("$a = $i * $k\nreturn [$a - $i, $a, $a + $i]", "$i times $k and its neighbours in steps of $i"),
    ],
    &[
        (
            "$a = 0\nfor v in $L:\n    if v > $a:\n        $a = v\n    else:\n        $a -= $k\nreturn $a",
            "largest of $L so far, $k less for each smaller",
        ),
        (
            "$a = ''\nfor i, c in enumerate($S):\n    if i % 2 == 1:\n        $a += c.upper()\n    else:\n        $a += c\nreturn $a",
            "$S with every second letter in upper case",
        ),
        (
            "$a = []\nfor i in range(len($l)):\n    $a.append($l[i] - $l[-1 - i] + $k)\nreturn $a",
            "$l minus $l reversed plus $k",
        ),
        (
            "$a = $k\nfor v in $L:\n    $a = $a * 2 - v if v < $k2 else $a + v\nreturn $a",
            "$k doubled minus each of $L below $k2, else plus it",
        ),
        ("$a = ''\nfor c in $S:\n    if c not in $a:\n        $a += c\nreturn $a", "letters of $S without repeats"),
        (
            "$a = {}\nfor v in $L:\n    $a[v % $q] = $a.get(v % $q, 0) + v\nreturn $a",
            "sums of $L by the rest modulo $q",
        ),
        (
            "$a = 0\nfor i, v in enumerate($L):\n    if i % 2 == 0:\n        $a += v\n    else:\n        $a -= v\nreturn $a",
            "sum of $L with changing sign",
        ),
        (
            "$a = []\nfor w in $W:\n    $a.append(w[0] + str(len(w)))\nreturn $a",
            "first letter and length of each of $W",
        ),
        (
            "$a = []\nfor v in $L:\n    if $a and v < $a[-1]:\n        v = $a[-1]\n    $a.append(v)\nreturn $a",
            "running maximum of $L",
        ),
        (
            "for i, v in enumerate($L):\n    if v > $k:\n        return i\nreturn -1",
            "place of the first of $L above $k",
        ),
        ("$a = $k\nfor w in $W:\n    $a += w.count($c) + len(w)\nreturn $a", "$k plus $c and letters in $W"),
        ("$a = 0\nfor k in $d:\n    $a += $d[k] * len(k)\nreturn $a", "values of $d times the lengths of their keys"),
        (
            "$a = []\nfor i in range($q):\n    $a.append($i)\n    $i = $i // 2 + $k\nreturn $a",
            "$q times $i halved plus $k",
        ),
    ],
];

/// A suite by name with `count` programs per level, each in the three task types; none when the name is not a suite's.
///
/// # Errors
/// When the executor stops, or runs so little that a level does not fill.
pub fn items(name: &str, pool: &Pool, count: usize) -> Result<Option<Vec<Item>>> {
    let num_levels = match name {
        NAME => TEMPLATES.len(),
        GRAMMAR => GRAMMAR_LEVELS,
        _ => return Ok(None),
    };
    let mut items = Vec::new();
    for level in 1..=num_levels {
        let programs = programs(name, pool, level, count)?;
        for kind in KINDS {
            let suite = format!("{name}/{}/{level}", kind.name());
            items.extend(programs.iter().enumerate().map(|(i, p)| Item {
                suite: suite.clone(),
                id: i.to_string(),
                question: Question::Task(p.task(kind)),
            }));
        }
    }
    // By type first, as the table is.
    items.sort_by(|a, b| a.suite.cmp(&b.suite));
    Ok(Some(items))
}

/// Candidate number `index` of a level.
fn draw(name: &str, level: usize, index: u64) -> (Program, Vec<String>) {
    if name == GRAMMAR {
        return numbered(PRETRAINING_SEED, index * HELD_OUT_EVERY);
    }
    let mut rng = Rng::new(SEED, Purpose::Eval, index, level as u32);
    let program = generator::program_of(&mut rng, level as u8, TEMPLATES[level - 1]);
    let inputs = inputs(&mut rng, &program.params);
    (program, inputs)
}

fn programs(name: &str, pool: &Pool, level: usize, count: usize) -> Result<Vec<Executed>> {
    let mut found: Vec<Executed> = Vec::new();
    let mut known = HashSet::new();
    for chunk in 0..MAX_CHUNKS {
        let drawn = (chunk * CHUNK..(chunk + 1) * CHUNK).map(|index| draw(name, level, index));
        let drawn = drawn.filter(|(program, _)| usize::from(program.level) == level);
        for executed in execute_programs(pool, drawn.collect())? {
            let outputs: HashSet<&str> = executed.pairs.iter().map(|p| p.output.as_str()).collect();
            let whole = executed.pairs.len() == NUM_INDUCTION_INPUTS && outputs.len() >= MIN_OUTPUTS;
            // Programs may come back with other inputs, but not tasks.
            let key = (normal_form(&executed.program.code), executed.pairs[0].input.clone());
            if whole && known.insert(key) {
                found.push(executed);
                if found.len() == count {
                    return Ok(found);
                }
            }
        }
    }
    Err(Error::config(format!("the suite {name} has {} programs of level {level}, not {count}", found.len()))
        .with_hint("ask for fewer with --limit"))
}
