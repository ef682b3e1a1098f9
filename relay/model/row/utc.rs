//! Conversion of `timestamptz` values in PostgreSQL's JSON, which has any time zone, to UTC, so that equal times have equal text.

/// Converts the JSON string of a timestamp to UTC; `None` when it already is, or is no such string (`"infinity"`, null).
///
/// `"2026-01-02T03:04:05.67+02:00"` becomes `"2026-01-02T01:04:05.67+00:00"`. Offsets may have seconds, years more than four
/// digits, and dates before the year 1 end in ` BC`.
pub fn to_utc(json: &str) -> Option<String> {
    let text = json.strip_prefix('"')?.strip_suffix('"')?;
    let (text, is_bc) = text.strip_suffix(" BC").map_or((text, false), |text| (text, true));
    let (date, time) = text.split_once('T')?;
    let sign = time.find(['+', '-'])?;
    let (clock, offset) = time.split_at(sign);
    let offset = seconds_of(&offset[1..])? * if offset.starts_with('-') { -1 } else { 1 };
    if offset == 0 {
        return None;
    }
    let (whole, fraction) = clock.find('.').map_or((clock, ""), |point| clock.split_at(point));
    let mut fields = date.split('-').map(|field| field.parse::<i64>().ok());
    let (year, month, day) = (fields.next()??, fields.next()??, fields.next()??);
    // There is no year 0: 1 BC precedes 1.
    let days = days_of(if is_bc { 1 - year } else { year }, month, day);
    let seconds = days.checked_mul(DAY)?.checked_add(seconds_of(whole)? - offset)?;
    let (year, month, day) = date_of(seconds.div_euclid(DAY));
    let clock = seconds.rem_euclid(DAY);
    let (year, era) = if year > 0 { (year, "") } else { (1 - year, " BC") };
    Some(format!(
        "\"{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}{fraction}+00:00{era}\"",
        clock / 3600,
        clock / 60 % 60,
        clock % 60
    ))
}

const DAY: i64 = 24 * 60 * 60;

/// Returns the seconds of `HH:MM` or `HH:MM:SS`.
fn seconds_of(clock: &str) -> Option<i64> {
    let mut fields = clock.split(':').map(|field| field.parse::<i64>().ok());
    let (hours, minutes) = (fields.next()??, fields.next()??);
    let seconds = match fields.next() {
        Some(seconds) => seconds?,
        None => 0,
    };
    fields.next().is_none().then_some(hours * 3600 + minutes * 60 + seconds)
}

/// Returns the days since 1970-01-01 of a date of the proleptic Gregorian calendar; year 0 is 1 BC.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March, so that the leap day is the last day; an era is 400 years.
    let year = if month > 2 { year } else { year - 1 };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// Returns the date of a number of days since 1970-01-01.
fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * of_era + of_era / 4 - of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let (year, day) = (era * 400 + of_era, of_year - (153 * month + 2) / 5 + 1);
    let month = if month < 10 { month + 3 } else { month - 9 };
    (if month <= 2 { year + 1 } else { year }, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn timestamps_are_converted_to_utc() {
        for (json, expected) in [
            ("\"2026-01-02T03:04:05.678901+02:00\"", "\"2026-01-02T01:04:05.678901+00:00\""),
            ("\"2026-01-01T00:30:00+05:30\"", "\"2025-12-31T19:00:00+00:00\""),
            ("\"2024-02-28T22:00:00-03:00\"", "\"2024-02-29T01:00:00+00:00\""),
            ("\"2023-02-28T22:00:00.5-03:00\"", "\"2023-03-01T01:00:00.5+00:00\""),
            ("\"1900-01-01T00:19:32+00:19:32\"", "\"1900-01-01T00:00:00+00:00\""),
            ("\"1883-11-18T12:03:57-04:56:02\"", "\"1883-11-18T16:59:59+00:00\""),
            ("\"0001-01-01T00:30:00+01:00\"", "\"0001-12-31T23:30:00+00:00 BC\""),
            ("\"0001-12-31T23:30:00-01:00 BC\"", "\"0001-01-01T00:30:00+00:00\""),
            ("\"4714-11-23T19:00:00-05:00 BC\"", "\"4714-11-24T00:00:00+00:00 BC\""),
            ("\"294277-01-01T08:59:59.999999+09:00\"", "\"294276-12-31T23:59:59.999999+00:00\""),
        ] {
            assert_eq!(to_utc(json).as_deref(), Some(expected), "{json}");
        }
    }

    #[test]
    fn utc_and_other_strings_are_unchanged() {
        for json in [
            "\"2026-01-02T01:04:05+00:00\"",
            "\"0044-03-15T12:00:00+00:00 BC\"",
            "\"infinity\"",
            "\"-infinity\"",
            "null",
            "1",
            "\"\"",
            "\"T+\"",
            "\"2026-01-02\"",
        ] {
            assert_eq!(to_utc(json), None, "{json}");
        }
    }

    proptest! {
        #[test]
        fn dates_round_trip(days in -3_000_000_i64..120_000_000) {
            let (year, month, day) = date_of(days);
            prop_assert!((1..=12).contains(&month) && (1..=31).contains(&day));
            prop_assert_eq!(days_of(year, month, day), days);
        }

        #[test]
        fn no_text_panics(text in "\"?[-+T:.0-9 BC]{0,40}\"?") {
            to_utc(&text);
        }
    }
}
