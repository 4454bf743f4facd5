//! The `test` and `[` commands (GRUB manual, 16.3.75).

use super::super::version;
use std::cmp::Ordering;

/// Nesting of parentheses and negations.
const DEPTH_MAX: usize = 16;

/// Evaluates the words of a test. `file` says whether a path is a file (`Some(false)`), a directory or neither.
/// Nonsense is false.
pub(crate) fn evaluate(words: &[String], file: &mut dyn FnMut(&str) -> Option<bool>) -> bool {
    let mut at = 0;
    or(words, &mut at, file, 0).unwrap_or(false) && at == words.len()
}

type File<'a> = &'a mut dyn FnMut(&str) -> Option<bool>;

fn or(words: &[String], at: &mut usize, file: File<'_>, depth: usize) -> Option<bool> {
    let mut value = and(words, at, file, depth)?;
    while words.get(*at).is_some_and(|w| w == "-o") {
        *at += 1;
        let right = and(words, at, file, depth)?;
        value = value || right;
    }
    Some(value)
}

fn and(words: &[String], at: &mut usize, file: File<'_>, depth: usize) -> Option<bool> {
    let mut value = term(words, at, file, depth)?;
    while words.get(*at).is_some_and(|w| w == "-a") {
        *at += 1;
        let right = term(words, at, file, depth)?;
        value = value && right;
    }
    Some(value)
}

fn term(words: &[String], at: &mut usize, file: File<'_>, depth: usize) -> Option<bool> {
    if depth > DEPTH_MAX {
        return None;
    }
    let rest = words.get(*at..)?;
    // Two operands around an operator come first: `[ "(" = "(" ]`.
    if let [left, operator, right, ..] = rest
        && let Some(value) = binary(left, operator, right)
    {
        *at += 3;
        return Some(value);
    }
    match rest {
        [bang, _, ..] if bang == "!" => {
            *at += 1;
            term(words, at, file, depth + 1).map(|v| !v)
        }
        [open, ..] if open == "(" => {
            *at += 1;
            let value = or(words, at, file, depth + 1)?;
            if words.get(*at).is_none_or(|w| w != ")") {
                return None;
            }
            *at += 1;
            Some(value)
        }
        [operator, operand, ..] if operator.len() == 2 && operator.starts_with('-') => {
            let value = match operator.as_str() {
                "-n" => !operand.is_empty(),
                "-z" => operand.is_empty(),
                "-f" | "-s" => file(operand) == Some(false),
                "-e" => file(operand).is_some(),
                "-d" => file(operand) == Some(true),
                _ => return None,
            };
            *at += 2;
            Some(value)
        }
        // `[ -z ]`, from `[ -z $unset ]`: the operand vanished.
        [operator] if operator == "-z" => {
            *at += 1;
            Some(true)
        }
        [operator] if operator == "-n" => {
            *at += 1;
            Some(false)
        }
        [text, ..] => {
            *at += 1;
            Some(!text.is_empty())
        }
        [] => None,
    }
}

fn binary(left: &str, operator: &str, right: &str) -> Option<bool> {
    let number = |s: &str| s.trim().parse::<i64>().unwrap_or(0);
    Some(match operator {
        "=" | "==" => left == right,
        "!=" => left != right,
        "<" => left < right,
        "<=" => left <= right,
        ">" => left > right,
        ">=" => left >= right,
        "-eq" => number(left) == number(right),
        "-ne" => number(left) != number(right),
        "-lt" => number(left) < number(right),
        "-le" => number(left) <= number(right),
        "-gt" => number(left) > number(right),
        "-ge" => number(left) >= number(right),
        "-vgt" => version::compare(left, right) == Ordering::Greater,
        "-vlt" => version::compare(left, right) == Ordering::Less,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        let run = |text: &str| {
            let words: Vec<String> = text.split(' ').map(|w| w.replace('~', "")).collect();
            evaluate(&words, &mut |p| match p {
                "/file" => Some(false),
                "/dir" => Some(true),
                _ => None,
            })
        };
        for yes in [
            "xa = xa",
            "a != b",
            "-n a",
            "-z ~",
            "! -z a",
            "-f /file",
            "-d /dir",
            "-e /dir",
            "1 -lt 2",
            "a -a b",
            "~ -o b",
            "( a = a ) -a ! ( a = b )",
            "-z",
            "-s /file",
            "2 -ge 2",
            "! ~",
            "-f = -f",
        ] {
            assert!(run(yes), "{yes}");
        }
        for no in [
            "xa = xb", "-n ~", "-f /dir", "-f /none", "~", "a = a b", "( a", "a -a ~", "-q x", "2 -gt 3",
            "-n",
        ] {
            assert!(!run(no), "{no}");
        }
    }
}
