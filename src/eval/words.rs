//! Answers in words: yes or no, and the spans of reading comprehension with DROP's exact match and F1.

/// The yes or no of an answer: its first word where that is one, else the last one anywhere in it.
pub fn yes_or_no(text: &str) -> Option<bool> {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty());
    let meaning = |word: &str| match word.to_ascii_lowercase().as_str() {
        "yes" | "true" => Some(true),
        "no" | "false" => Some(false),
        _ => None,
    };
    words.clone().next().and_then(meaning).or_else(|| words.filter_map(meaning).next_back())
}

/// Exact match (0 or 1) and F1 of an answer against the best of several golds, each of one or more spans.
///
/// As DROP defines it (Dua et al., 2019): articles, punctuation and case do not count, numbers are compared as numbers,
/// spans are matched one to one so that the sum of their F1 is largest, and a pair without a common number has F1 0 where
/// the gold has one. The answer is read as one span, and where that is worse, as a list.
pub fn drop_scores(golds: &[Vec<String>], answer: &str) -> (f64, f64) {
    let single = vec![answer.to_owned()];
    let commas = answer.replace(" and ", ",");
    let listed = commas.split([',', ';', '\n']).map(str::trim).filter(|s| !s.is_empty());
    let listed: Vec<String> = listed.map(str::to_owned).collect();
    let mut best = (0.0f64, 0.0f64);
    for gold in golds.iter().filter(|g| !g.is_empty()) {
        for spans in [&single, &listed] {
            let (exact, f1) = against(gold, spans);
            best = (best.0.max(exact), best.1.max(f1));
        }
    }
    best
}

fn against(gold: &[String], spans: &[String]) -> (f64, f64) {
    let words = |spans: &[String]| -> Vec<Vec<String>> { spans.iter().map(|s| normal_words(s)).collect() };
    let (gold, spans) = (words(gold), words(spans));
    let sorted = |bags: &[Vec<String>]| {
        let mut texts: Vec<String> = bags.iter().map(|b| b.join(" ")).collect();
        texts.sort_unstable();
        texts
    };
    let exact = sorted(&gold) == sorted(&spans) && gold.iter().any(|g| !g.is_empty());
    let scores: Vec<Vec<f64>> = gold.iter().map(|g| spans.iter().map(|s| bag_f1(g, s)).collect()).collect();
    let f1 = best_matching(&scores) / gold.len().max(spans.len()).max(1) as f64;
    // The reference implementation rounds to whole percents.
    (f64::from(u8::from(exact)), (f1 * 100.0).round() / 100.0)
}

/// Largest sum of scores when rows and columns are paired one to one: the Hungarian method, row by row.
fn best_matching(scores: &[Vec<f64>]) -> f64 {
    let (rows, columns) = (scores.len(), scores.first().map_or(0, Vec::len));
    // Columns may be left over, rows not; of both, number 0 stands for none.
    let (n, m) = (rows.min(columns), rows.max(columns));
    let score = |r: usize, c: usize| if rows <= columns { scores[r - 1][c - 1] } else { scores[c - 1][r - 1] };
    let (mut of_row, mut of_column) = (vec![0.0; n + 1], vec![0.0; m + 1]);
    let mut row_at = vec![0; m + 1];
    for row in 1..=n {
        let (mut least, mut from, mut seen) = (vec![f64::INFINITY; m + 1], vec![0; m + 1], vec![false; m + 1]);
        row_at[0] = row;
        let mut at = 0;
        while row_at[at] != 0 {
            seen[at] = true;
            let r = row_at[at];
            for c in (1..=m).filter(|c| !seen[*c]) {
                let slack = -score(r, c) - of_row[r] - of_column[c];
                if slack < least[c] {
                    (least[c], from[c]) = (slack, at);
                }
            }
            let Some(next) = (1..=m).filter(|c| !seen[*c]).min_by(|a, b| least[*a].total_cmp(&least[*b])) else {
                break;
            };
            let step = least[next];
            for c in 0..=m {
                if seen[c] {
                    of_row[row_at[c]] += step;
                    of_column[c] -= step;
                } else {
                    least[c] -= step;
                }
            }
            at = next;
        }
        while at != 0 {
            row_at[at] = row_at[from[at]];
            at = from[at];
        }
    }
    (1..=m).filter(|c| row_at[*c] != 0).map(|c| score(row_at[c], c)).sum()
}

fn bag_f1(gold: &[String], span: &[String]) -> f64 {
    let number = |w: &&String| w.parse::<f64>().is_ok();
    let numbers: Vec<&String> = gold.iter().filter(number).collect();
    if !numbers.is_empty() && !numbers.iter().any(|n| span.contains(n)) {
        return 0.0;
    }
    // Bags are sets in the reference implementation.
    let distinct = |bag: &[String]| {
        let mut bag = bag.to_vec();
        bag.sort_unstable();
        bag.dedup();
        bag
    };
    let (gold, span) = (distinct(gold), distinct(span));
    let common = gold.iter().filter(|w| span.contains(w)).count() as f64;
    if common == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (common / span.len() as f64, common / gold.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// Words in lower case without articles and punctuation; numbers in one spelling.
fn normal_words(text: &str) -> Vec<String> {
    let word = |word: &str| {
        let word = word.to_lowercase();
        let bare: String = word.chars().filter(|c| !c.is_ascii_punctuation() || matches!(c, '.' | '-')).collect();
        if let Ok(number) = bare.trim_end_matches('.').parse::<f64>() {
            return number.to_string();
        }
        word.chars().filter(|c| !c.is_ascii_punctuation()).collect()
    };
    let words = text.split(|c: char| c.is_whitespace()).flat_map(|w| {
        // A hyphen joins words, but not the sign of a number.
        if w.trim_start_matches(['-', '$']).parse::<f64>().is_ok() { vec![w] } else { w.split('-').collect() }
    });
    words.map(word).filter(|w| !w.is_empty() && !["a", "an", "the"].contains(&w.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::{Purpose, Rng};

    #[test]
    fn yes_and_no_are_found() {
        for (text, says) in [
            ("Yes", Some(true)),
            ("no.", Some(false)),
            ("Yes, there is no doubt", Some(true)),
            ("It is not known; I would say false.", Some(false)),
            ("True", Some(true)),
            ("nobody knows, yesterday", None),
            ("", None),
        ] {
            assert_eq!(yes_or_no(text), says, "{text}");
        }
    }

    #[test]
    fn pairs_are_matched_for_the_largest_sum() {
        let mut rng = Rng::new(7, Purpose::Test, 0, 0);
        for _ in 0..500 {
            let (rows, columns) = (rng.below(5), rng.below(5));
            let scores: Vec<Vec<f64>> =
                (0..rows).map(|_| (0..columns).map(|_| rng.below(4) as f64).collect()).collect();
            assert_eq!(best_matching(&scores), tried(&scores, 0, &mut vec![false; columns]), "{scores:?}");
        }
    }

    /// Every way to give rows columns.
    fn tried(scores: &[Vec<f64>], row: usize, taken: &mut Vec<bool>) -> f64 {
        if row == scores.len() {
            return 0.0;
        }
        let mut best = tried(scores, row + 1, taken);
        for c in 0..taken.len() {
            if !taken[c] {
                taken[c] = true;
                best = best.max(scores[row][c] + tried(scores, row + 1, taken));
                taken[c] = false;
            }
        }
        best
    }

    #[test]
    fn spans_are_scored_as_drop_does() {
        let golds = |spans: &[&[&str]]| -> Vec<Vec<String>> {
            spans.iter().map(|g| g.iter().map(|s| (*s).to_owned()).collect()).collect()
        };
        for (gold, answer, exact, f1) in [
            (golds(&[&["5"]]), "5", 1.0, 1.0),
            (golds(&[&["5"]]), "5.0", 1.0, 1.0),
            (golds(&[&["5,000"]]), "5000", 1.0, 1.0),
            (golds(&[&["5"]]), "6", 0.0, 0.0),
            (golds(&[&["5 yards"]]), "6 yards", 0.0, 0.0),
            (golds(&[&["the Denver Broncos"]]), "Denver broncos!", 1.0, 1.0),
            (golds(&[&["Denver Broncos"]]), "Broncos", 0.0, 0.67),
            (golds(&[&["Alice", "Bob"]]), "Bob and Alice", 1.0, 1.0),
            (golds(&[&["Alice", "Bob"]]), "Alice", 0.0, 0.5),
            (golds(&[&["John-Paul"]]), "john paul", 1.0, 1.0),
            (golds(&[&["9"], &["nine"]]), "Nine", 1.0, 1.0),
            (golds(&[&["9"]]), "", 0.0, 0.0),
            (golds(&[&[]]), "x", 0.0, 0.0),
        ] {
            assert_eq!(drop_scores(&gold, answer), (exact, f1), "{gold:?} {answer:?}");
        }
    }
}
