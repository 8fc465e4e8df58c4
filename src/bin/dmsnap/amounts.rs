//! Amounts as people write them: sizes, shares, durations. All arguments are read here.

use std::time::Duration;

use dmsnap::CowSize;

/// What stands behind a number of bytes; powers of 1024 all of them.
const UNITS: [(&str, u32); 8] = [
    ("KiB", 10),
    ("MiB", 20),
    ("GiB", 30),
    ("TiB", 40),
    ("K", 10),
    ("M", 20),
    ("G", 30),
    ("T", 40),
];

/// `67108864`, `64M` or `64MiB`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let unit = UNITS
        .iter()
        .find_map(|(unit, power)| Some((text.strip_suffix(unit)?, *power)));
    let (number, power) = unit.unwrap_or((text, 0));
    let count: u64 = plain(number)
        .map_err(|error| format!("{error}: need bytes, or 512K, 64MiB, 2G, in whole numbers"))?;
    let too_large = || "too large".to_owned();
    count.checked_mul(1 << power).ok_or_else(too_large)
}

/// `80%` or `80`, from 1 to 100.
pub(crate) fn percent(text: &str) -> Result<u8, String> {
    match plain(text.strip_suffix('%').unwrap_or(text))? {
        share @ 1..=100 => Ok(share),
        _ => Err("need 1% to 100%".to_owned()),
    }
}

/// `67108864`, `64M`, `25%` or `worst-case`.
pub(crate) fn cow_size(text: &str) -> Result<CowSize, String> {
    match text.strip_suffix('%') {
        Some(share) => plain(share).map(CowSize::Percent),
        None if text == "worst-case" => Ok(CowSize::WorstCase),
        None => bytes(text).map(CowSize::Bytes),
    }
}

/// `15s`, `1.5s` or `200ms`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 0.001),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds = number.parse::<f64>().map_err(|error| error.to_string())? * unit;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// Digits alone: `parse` would take a sign.
fn plain<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    if text.starts_with('+') {
        return Err("invalid digit found in string".to_owned());
    }
    text.parse().map_err(|error: T::Err| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, size) in [
            ("0", Some(0)),
            ("67108864", Some(64 << 20)),
            ("64M", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("512K", Some(512 << 10)),
            ("1KiB", Some(1024)),
            ("2G", Some(2 << 30)),
            ("3TiB", Some(3 << 40)),
            ("16777216T", None),
            ("", None),
            ("M", None),
            ("+1M", None),
            ("-1", None),
            ("1.5G", None),
            ("64MB", None),
            ("64 M", None),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
        ] {
            assert_eq!(bytes(text).ok(), size, "{text:?}");
        }
    }

    #[test]
    fn shares_are_whole_percent() {
        for (text, share) in [
            ("80%", Some(80)),
            ("80", Some(80)),
            ("1%", Some(1)),
            ("100%", Some(100)),
            ("0%", None),
            ("101%", None),
            ("+5%", None),
            ("%", None),
            ("80%%", None),
        ] {
            assert_eq!(percent(text).ok(), share, "{text:?}");
        }
        assert_eq!(cow_size("250%"), Ok(CowSize::Percent(250)));
        assert_eq!(cow_size("worst-case"), Ok(CowSize::WorstCase));
        assert_eq!(cow_size("1M"), Ok(CowSize::Bytes(1 << 20)));
    }
}
