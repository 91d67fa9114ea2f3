//! Values of Python's `datetime`: dates, times, differences and fixed time zones.
//!
//! Only what has a literal: `fold` is 0, time zones are unnamed fixed offsets.

use std::fmt;

/// Microseconds of a day.
const DAY_US: i64 = 86_400_000_000;
/// Most days of a difference, as in Python.
const MAX_DAYS: i64 = 999_999_999;

/// A value of the module `datetime`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Moment {
    /// A date.
    Date(Date),
    /// A time of day.
    Time(Clock),
    /// A date with a time of day.
    DateTime(Date, Clock),
    /// A difference, in microseconds.
    Delta(i128),
    /// A time zone: its offset from UTC in microseconds.
    Zone(i64),
}

/// A day of the Gregorian calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    year: i64,
    month: i64,
    day: i64,
}

impl Date {
    /// A date that exists, of the years 1 to 9999.
    pub fn new(year: i64, month: i64, day: i64) -> Option<Self> {
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let days = match month {
            2 => 28 + i64::from(leap),
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        ((1..=9999).contains(&year) && (1..=days).contains(&day)).then_some(Date { year, month, day })
    }

    /// Year, month and day.
    pub fn parts(self) -> [i64; 3] {
        [self.year, self.month, self.day]
    }

    /// Days since a fixed one (the usual count from March on, so that leap days come last).
    fn days(self) -> i64 {
        let (y, m) = if self.month > 2 { (self.year, self.month - 3) } else { (self.year - 1, self.month + 9) };
        365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + self.day
    }
}

/// A time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    parts: [i64; 4],
    /// Offset of its time zone from UTC in microseconds.
    zone: Option<i64>,
}

impl Clock {
    /// A time from hour, minute, second and microsecond, with the offset of its time zone.
    pub fn new(parts: [i64; 4], zone: Option<i64>) -> Option<Self> {
        let fits = parts.iter().zip([24, 60, 60, 1_000_000]).all(|(p, limit)| (0..limit).contains(p));
        fits.then_some(Clock { parts, zone })
    }

    /// Hour, minute, second and microsecond.
    pub fn parts(self) -> [i64; 4] {
        self.parts
    }

    /// Offset of its time zone from UTC, in microseconds.
    pub fn zone(self) -> Option<i64> {
        self.zone
    }

    fn micros(self) -> i64 {
        let [hour, minute, second, micro] = self.parts;
        ((hour * 60 + minute) * 60 + second) * 1_000_000 + micro
    }

    /// `hour, minute[, second[, microsecond]]` as Python prints it.
    fn write(self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [hour, minute, second, micro] = self.parts;
        write!(f, "{hour}, {minute}")?;
        if second != 0 || micro != 0 {
            write!(f, ", {second}")?;
        }
        if micro != 0 {
            write!(f, ", {micro}")?;
        }
        Ok(())
    }
}

impl Moment {
    /// A difference in range.
    pub fn delta(micros: i128) -> Option<Self> {
        (micros.div_euclid(i128::from(DAY_US)).abs() <= i128::from(MAX_DAYS)).then_some(Moment::Delta(micros))
    }

    /// A time zone less than a day from UTC.
    pub fn zone(micros: i128) -> Option<Self> {
        (micros.abs() < i128::from(DAY_US)).then_some(Moment::Zone(micros as i64))
    }

    /// Writes a text that equal moments share: those with a time zone are compared in UTC, and equal none without.
    pub(crate) fn key(&self, out: &mut String) {
        let text = match self {
            Moment::Date(date) => format!("D{}", date.days()),
            Moment::Time(clock) => match clock.zone {
                None => format!("T{}", clock.micros()),
                Some(zone) => format!("U{}", clock.micros() - zone),
            },
            Moment::DateTime(date, clock) => {
                let micros = date.days() * DAY_US + clock.micros();
                match clock.zone {
                    None => format!("L{micros}"),
                    Some(zone) => format!("M{}", micros - zone),
                }
            }
            Moment::Delta(micros) => format!("E{micros}"),
            Moment::Zone(offset) => format!("Z{offset}"),
        };
        out.push_str(&text);
    }
}

fn write_delta(micros: i128, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let day = i128::from(DAY_US);
    let (days, rest) = (micros.div_euclid(day), micros.rem_euclid(day));
    let parts = [("days", days), ("seconds", rest / 1_000_000), ("microseconds", rest % 1_000_000)];
    let parts: Vec<String> = parts.iter().filter(|(_, n)| *n != 0).map(|(name, n)| format!("{name}={n}")).collect();
    write!(f, "datetime.timedelta({})", if parts.is_empty() { "0".to_owned() } else { parts.join(", ") })
}

fn write_zone(offset: i64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if offset == 0 {
        return f.write_str("datetime.timezone.utc");
    }
    f.write_str("datetime.timezone(")?;
    write_delta(i128::from(offset), f)?;
    f.write_str(")")
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clock = match self {
            Moment::Date(d) => return write!(f, "datetime.date({}, {}, {})", d.year, d.month, d.day),
            Moment::Delta(micros) => return write_delta(*micros, f),
            Moment::Zone(offset) => return write_zone(*offset, f),
            Moment::Time(clock) => {
                f.write_str("datetime.time(")?;
                clock
            }
            Moment::DateTime(d, clock) => {
                write!(f, "datetime.datetime({}, {}, {}, ", d.year, d.month, d.day)?;
                clock
            }
        };
        clock.write(f)?;
        if let Some(zone) = clock.zone {
            f.write_str(", tzinfo=")?;
            write_zone(zone, f)?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_print_as_python_prints_them() {
        let date = Date::new(2020, 2, 29).expect("a leap day");
        let clock = |parts, zone| Clock::new(parts, zone).expect("a time");
        for (moment, text) in [
            (Moment::Date(date), "datetime.date(2020, 2, 29)"),
            (Moment::Time(clock([1, 2, 0, 0], None)), "datetime.time(1, 2)"),
            (Moment::DateTime(date, clock([0, 0, 0, 5], None)), "datetime.datetime(2020, 2, 29, 0, 0, 0, 5)"),
            (Moment::Delta(-1), "datetime.timedelta(days=-1, seconds=86399, microseconds=999999)"),
            (Moment::Delta(0), "datetime.timedelta(0)"),
            (Moment::Zone(3_600_000_000), "datetime.timezone(datetime.timedelta(seconds=3600))"),
            (Moment::Time(clock([1, 0, 3, 0], Some(0))), "datetime.time(1, 0, 3, tzinfo=datetime.timezone.utc)"),
        ] {
            assert_eq!(moment.to_string(), text);
        }
        assert!(Date::new(2019, 2, 29).is_none() && Date::new(1900, 2, 29).is_none() && Date::new(0, 1, 1).is_none());
        assert!(Clock::new([24, 0, 0, 0], None).is_none() && Moment::zone(i128::from(DAY_US)).is_none());
        assert!(Moment::delta(i128::from(DAY_US) * 1_000_000_000).is_none());
    }

    #[test]
    fn time_zones_are_compared_in_utc() {
        let key = |hour, zone| {
            let date = Date::new(1, 1, 1).expect("a date");
            let mut out = String::new();
            Moment::DateTime(date, Clock::new([hour, 0, 0, 0], zone).expect("a time")).key(&mut out);
            out
        };
        assert_eq!(key(3, Some(3_600_000_000)), key(2, Some(0)));
        assert_ne!(key(2, None), key(2, Some(0)));
        let days = |y, m, d| Date::new(y, m, d).expect("a date").days();
        assert_eq!(days(2000, 3, 1) - days(2000, 2, 28), 2);
        assert_eq!(days(2001, 1, 1) - days(2000, 1, 1), 366);
    }
}
