//! Times of the week at which batches may run.

use jiff::Timestamp;
use jiff::civil::Weekday;
use jiff::tz::{Offset, TimeZone};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A time of the week.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Days on which it begins; default: each.
    #[serde(default)]
    pub days: Vec<Day>,
    /// When it opens, as `HH:MM`.
    pub from: String,
    /// When it closes, as `HH:MM`; before `from`: on the next day.
    pub to: String,
    /// The clock that is meant, by its IANA name, such as `Europe/Berlin`: summer time is kept. Default: UTC.
    #[serde(default)]
    pub time_zone: Option<String>,
    /// Instead of `time_zone`: a fixed distance from UTC, as `+02:00`.
    #[serde(default)]
    pub utc_offset: Option<String>,
}

/// A day of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "days of the week")]
pub enum Day {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

impl Day {
    fn of(day: Weekday) -> Self {
        match day {
            Weekday::Monday => Self::Mon,
            Weekday::Tuesday => Self::Tue,
            Weekday::Wednesday => Self::Wed,
            Weekday::Thursday => Self::Thu,
            Weekday::Friday => Self::Fri,
            Weekday::Saturday => Self::Sat,
            Weekday::Sunday => Self::Sun,
        }
    }
}

impl Window {
    /// Whether it is open at `unix` (seconds). By the clock on the wall: an hour that summer time skips does not open it,
    /// one that comes twice opens it twice.
    pub fn is_open(&self, unix: i64) -> bool {
        let (Some(from), Some(to), Ok(zone)) = (minutes(&self.from), minutes(&self.to), self.zone()) else {
            return false;
        };
        let Ok(at) = Timestamp::from_second(unix) else { return false };
        let local = at.to_zoned_datetime(zone);
        let minute = u32::from(local.hour().unsigned_abs()) * 60 + u32::from(local.minute().unsigned_abs());
        let today = local.weekday();
        let on = |day: Weekday| self.days.is_empty() || self.days.contains(&Day::of(day));
        if from <= to {
            (from..to).contains(&minute) && on(today)
        } else {
            (minute >= from && on(today)) || (minute < to && on(today.previous()))
        }
    }

    /// For people: when, and by which clock.
    pub fn text(&self) -> String {
        let clock = self.time_zone.as_deref().or(self.utc_offset.as_deref()).unwrap_or("UTC");
        format!("{} to {} {clock}", self.from, self.to)
    }

    /// What is wrong with it.
    pub fn problem(&self) -> Option<String> {
        let (from, to) = (minutes(&self.from), minutes(&self.to));
        if from.is_none() || to.is_none() {
            return Some(format!("expected from and to as HH:MM; found {:?}, {:?}", self.from, self.to));
        }
        if from == to {
            return Some(format!("it opens and closes at {}, so it never opens", self.from));
        }
        self.zone().err()
    }

    fn zone(&self) -> Result<TimeZone, String> {
        match (self.time_zone.as_deref(), self.utc_offset.as_deref()) {
            (None, None) => Ok(TimeZone::UTC),
            (Some(name), None) => TimeZone::get(name).map_err(|_| {
                format!("time_zone: expected a name such as \"Europe/Berlin\" or \"UTC\", found {name:?}")
            }),
            (None, Some(text)) => offset(text)
                .ok_or_else(|| format!("utc_offset: expected +HH:MM or -HH:MM, at most 14 hours, found {text:?}")),
            (Some(_), Some(_)) => Err("expected time_zone or utc_offset, found both".into()),
        }
    }
}

/// Minutes from midnight.
fn minutes(text: &str) -> Option<u32> {
    let (h, m) = text.split_once(':')?;
    if text.len() != 5 || !text.bytes().all(|b| b.is_ascii_digit() || b == b':') {
        return None;
    }
    let (h, m): (u32, u32) = (h.parse().ok()?, m.parse().ok()?);
    (h < 24 && m < 60).then_some(h * 60 + m)
}

fn offset(text: &str) -> Option<TimeZone> {
    let sign = match text.chars().next()? {
        '+' => 1,
        '-' => -1,
        _ => return None,
    };
    let distance = i32::try_from(minutes(text.get(1..)?)?).ok()?;
    let seconds = (distance <= 14 * 60).then_some(sign * distance * 60)?;
    Offset::from_seconds(seconds).ok().map(TimeZone::fixed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(days: &[Day], from: &str, to: &str) -> Window {
        Window { days: days.to_vec(), from: from.into(), to: to.into(), time_zone: None, utc_offset: None }
    }

    fn at(text: &str) -> i64 {
        text.parse::<Timestamp>().unwrap().as_second()
    }

    #[test]
    fn windows_open_and_close_across_midnight_and_zones() {
        // A Tuesday.
        let tue = |hour: i64, minute: i64| at("2026-11-24T00:00:00Z") + hour * 3600 + minute * 60;
        let night = window(&[Day::Tue], "22:00", "04:00");
        assert!(!night.is_open(tue(3, 0)), "that is Monday's night");
        assert!(!night.is_open(tue(21, 59)) && night.is_open(tue(22, 0)) && night.is_open(tue(27, 59)));
        assert!(!night.is_open(tue(28, 0)));
        let noon = Window { utc_offset: Some("+02:00".into()), ..window(&[], "12:00", "13:00") };
        assert!(noon.is_open(tue(10, 30)) && !noon.is_open(tue(12, 30)));
        let late = Window { utc_offset: Some("-05:00".into()), ..window(&[Day::Mon], "23:00", "23:30") };
        assert!(late.is_open(tue(4, 10)));
    }

    #[test]
    fn summer_time_is_kept() {
        let berlin = |from, to| Window { time_zone: Some("Europe/Berlin".into()), ..window(&[], from, to) };
        let evening = berlin("20:00", "21:00");
        assert!(evening.is_open(at("2026-01-15T19:30:00Z")) && !evening.is_open(at("2026-01-15T18:30:00Z")));
        assert!(evening.is_open(at("2026-07-15T18:30:00Z")) && !evening.is_open(at("2026-07-15T19:30:00Z")));
        // On 29 March 2026 the clock goes from 01:59 to 03:00, on 25 October from 02:59 to 02:00.
        let two = berlin("02:00", "03:00");
        let open = |from: &str, minutes: i64| (0..minutes).filter(|m| two.is_open(at(from) + m * 60)).count();
        assert_eq!(open("2026-03-28T23:00:00Z", 23 * 60), 0, "that day has no such hour");
        assert_eq!(open("2026-10-24T22:00:00Z", 25 * 60), 120, "that day has it twice");
        // A night that begins on a Saturday ends on the Sunday, whatever its length.
        let night = Window { days: vec![Day::Sat], ..berlin("22:00", "04:00") };
        assert!(night.is_open(at("2026-03-29T01:59:00Z")) && !night.is_open(at("2026-03-29T02:00:00Z")));
        assert!(night.is_open(at("2026-10-25T02:59:00Z")) && !night.is_open(at("2026-10-25T03:00:00Z")));
    }

    #[test]
    fn what_never_opens_or_is_no_clock_is_named() {
        let zone = |name: &str| Window { time_zone: Some(name.into()), ..window(&[], "01:00", "02:00") };
        for (bad, said) in [
            (window(&[], "10:00", "10:00"), "never opens"),
            (window(&[], "25:00", "01:00"), "HH:MM"),
            (window(&[], "+1:00", "02:00"), "HH:MM"),
            (zone("Europe/Atlantis"), "found \"Europe/Atlantis\""),
            (Window { utc_offset: Some("CET".into()), ..window(&[], "01:00", "02:00") }, "utc_offset"),
            (Window { utc_offset: Some("+01:00".into()), ..zone("UTC") }, "found both"),
        ] {
            assert!(bad.problem().is_some_and(|p| p.contains(said)), "{bad:?}: {:?}", bad.problem());
            assert!(!bad.is_open(at("2026-11-24T01:30:00Z")), "{bad:?}");
        }
        assert_eq!(zone("Europe/Berlin").problem(), None);
    }
}
