//! Numbers as Python compares and prints them: one key for equal numbers of any type, and decimals.
//!
//! The key of a number is that of its exact ratio in lowest terms: `p`, `p/2^k` or `p/q`. An int, a float, a Fraction and
//! a Decimal that are equal share it.

use std::fmt::{self, Write as _};

use malachite_bigint::{BigInt, Sign};

/// Most decimal places, before or after the point, over which a Decimal is compared with other types of number: more than
/// any float has. The work of a comparison grows with their square.
const MAX_PLACES: i64 = 1100;

pub(crate) fn write_text(out: &mut String, text: impl fmt::Display) {
    write!(out, "{text}").expect("a String takes any text");
}

/// Writes the key of a float; false when it is nan, which equals nothing.
pub(crate) fn float_key(f: f64, out: &mut String) -> bool {
    if f.is_nan() {
        return false;
    }
    if f.is_infinite() {
        out.push_str(if f > 0.0 { "inf" } else { "-inf" });
        return true;
    }
    let bits = f.to_bits();
    let (exponent, fraction) = ((bits >> 52) & 0x7ff, bits & ((1 << 52) - 1));
    let (mantissa, exponent) =
        if exponent == 0 { (fraction, -1074) } else { (fraction | 1 << 52, exponent as i64 - 1075) };
    if mantissa == 0 {
        out.push('0');
        return true;
    }
    let zeros = mantissa.trailing_zeros();
    let (odd, exponent) = (mantissa >> zeros, exponent + i64::from(zeros));
    if f < 0.0 {
        out.push('-');
    }
    if exponent >= 0 {
        write_text(out, BigInt::from(odd) << exponent as u64);
    } else {
        write_text(out, format_args!("{odd}/2^{}", -exponent));
    }
    true
}

/// Writes the key of `p / q`, q above 0.
pub(crate) fn ratio_key(p: &BigInt, q: &BigInt, out: &mut String) {
    let (p, q) = reduced(p, q);
    let twos = q.trailing_zeros().unwrap_or(0);
    if q == BigInt::from(1) {
        write_text(out, p);
    } else if q.bits() == twos + 1 {
        write_text(out, format_args!("{p}/2^{twos}"));
    } else {
        write_text(out, format_args!("{p}/{q}"));
    }
}

/// `p / q` in lowest terms with a denominator above 0.
pub(crate) fn reduced(p: &BigInt, q: &BigInt) -> (BigInt, BigInt) {
    let zero = BigInt::from(0);
    let (mut a, mut b) = (p.clone(), q.clone());
    while b != zero {
        let rest = &a % &b;
        a = std::mem::replace(&mut b, rest);
    }
    let gcd = if (a.sign() == Sign::Minus) == (q.sign() == Sign::Minus) { a } else { -a };
    (p / &gcd, q / &gcd)
}

/// A `decimal.Decimal`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decimal {
    /// The sign.
    pub negative: bool,
    /// Digits of the coefficient, without leading zeros ("0" for zero).
    pub digits: String,
    /// The power of ten, or what the decimal is instead of a number.
    pub exponent: Exponent,
}

/// Exponent of a decimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exponent {
    /// A number: coefficient x 10^exponent.
    Finite(i64),
    /// Infinity.
    Infinity,
    /// Not a number.
    Nan,
}

impl Decimal {
    /// Reads the text that `Decimal(text)` takes.
    pub fn parse(text: &str) -> Option<Self> {
        let text: String = text.trim().chars().filter(|c| *c != '_').collect();
        let (negative, rest) = match text.as_bytes().first()? {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, &text[..]),
        };
        let special = |exponent| Some(Decimal { negative, digits: "0".to_owned(), exponent });
        match rest.to_ascii_lowercase().as_str() {
            "inf" | "infinity" => return special(Exponent::Infinity),
            "nan" => return special(Exponent::Nan),
            _ => {}
        }
        let (number, exponent) = match rest.split_once(['e', 'E']) {
            Some((number, exponent)) => (number, exponent.parse::<i64>().ok().filter(|e| e.abs() < 1 << 40)?),
            None => (rest, 0),
        };
        let (whole, places) = number.split_once('.').unwrap_or((number, ""));
        let digits = format!("{whole}{places}");
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        Some(Self::new(negative, &digits, exponent - places.len() as i64))
    }

    /// A number from its parts.
    pub fn new(negative: bool, digits: &str, exponent: i64) -> Self {
        let trimmed = digits.trim_start_matches('0');
        let digits = if trimmed.is_empty() { "0" } else { trimmed }.to_owned();
        Decimal { negative, digits, exponent: Exponent::Finite(exponent) }
    }

    /// Whether it is not a number.
    pub fn is_nan(&self) -> bool {
        self.exponent == Exponent::Nan
    }

    /// Writes the key; false when it is nan.
    pub(crate) fn key(&self, out: &mut String) -> bool {
        let sign = if self.negative { "-" } else { "" };
        let exponent = match self.exponent {
            Exponent::Nan => return false,
            Exponent::Infinity => {
                write_text(out, format_args!("{sign}inf"));
                return true;
            }
            Exponent::Finite(exponent) => exponent,
        };
        let short = self.digits.trim_end_matches('0');
        if short.is_empty() {
            out.push('0');
            return true;
        }
        let exponent = exponent + (self.digits.len() - short.len()) as i64;
        if exponent.abs() > MAX_PLACES {
            write_text(out, format_args!("{sign}{short}e{exponent}"));
        } else if exponent >= 0 {
            write_text(out, format_args!("{sign}{short}{}", "0".repeat(exponent as usize)));
        } else {
            let p = BigInt::parse_bytes(short.as_bytes(), 10).expect("decimal digits");
            ratio_key(&if self.negative { -p } else { p }, &BigInt::from(10).pow(-exponent as u32), out);
        }
        true
    }

    /// The text that `str` gives: digits with a point, with an exponent where Python writes one.
    pub fn text(&self) -> String {
        let sign = if self.negative { "-" } else { "" };
        let exponent = match self.exponent {
            Exponent::Infinity => return format!("{sign}Infinity"),
            Exponent::Nan => return format!("{sign}NaN"),
            Exponent::Finite(exponent) => exponent,
        };
        let len = self.digits.len() as i64;
        let left = exponent + len;
        let point = if exponent <= 0 && left > -6 { left } else { 1 };
        let mut out = sign.to_owned();
        if point <= 0 {
            write_text(&mut out, format_args!("0.{}{}", "0".repeat(-point as usize), self.digits));
        } else if point >= len {
            write_text(&mut out, format_args!("{}{}", self.digits, "0".repeat((point - len) as usize)));
        } else {
            let (whole, places) = self.digits.split_at(point as usize);
            write_text(&mut out, format_args!("{whole}.{places}"));
        }
        if left != point {
            write_text(&mut out, format_args!("E{:+}", left - point));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_print_as_python_prints_them() {
        for (text, printed) in [
            ("1.50", "1.50"),
            ("1e3", "1E+3"),
            ("0.000001", "0.000001"),
            ("0.0000001", "1E-7"),
            ("-0", "-0"),
            ("0e5", "0E+5"),
            ("0.00", "0.00"),
            ("123456E-2", "1234.56"),
            ("12e-10", "1.2E-9"),
            ("1_000.5", "1000.5"),
            ("inf", "Infinity"),
            ("-nan", "-NaN"),
            (".5", "0.5"),
            ("5.", "5"),
        ] {
            assert_eq!(Decimal::parse(text).map(|d| d.text()).as_deref(), Some(printed), "{text}");
        }
        for text in ["", "-", ".", "1e", "abc", "1.2.3", "0x1", "1e99999999999999", "\u{661}"] {
            assert_eq!(Decimal::parse(text), None, "{text}");
        }
    }

    #[test]
    fn equal_numbers_share_a_key() {
        let float = |f| {
            let mut out = String::new();
            float_key(f, &mut out);
            out
        };
        let ratio = |p: i64, q: i64| {
            let mut out = String::new();
            ratio_key(&BigInt::from(p), &BigInt::from(q), &mut out);
            out
        };
        let decimal = |s| {
            let mut out = String::new();
            Decimal::parse(s).expect("a decimal").key(&mut out);
            out
        };
        for (f, (p, q), d) in [
            (0.5, (1, 2), "0.50"),
            (-3.0, (-3, 1), "-3"),
            (0.0, (0, 7), "-0.0"),
            (1e16, (10_000_000_000_000_000, 1), "1E+16"),
            (-2.125, (-17, 8), "-2.125"),
        ] {
            assert_eq!(float(f), ratio(p, q));
            assert_eq!(float(f), decimal(d));
        }
        assert_eq!(ratio(2, 10), decimal("0.2"));
        assert_ne!(float(0.1), decimal("0.1"), "0.1 is no tenth");
        assert_eq!(float(f64::MIN_POSITIVE / 2.0), "1/2^1023");
        assert_eq!(reduced(&BigInt::from(6), &BigInt::from(-4)), (BigInt::from(-3), BigInt::from(2)));
    }
}
