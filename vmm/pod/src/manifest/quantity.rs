//! Kubernetes' quantities: `500m`, `2`, `1.5Gi`, `1e3`.

/// An amount in thousandths, so that CPU (`1m`) is exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(i128);

/// Suffix, and what it multiplies by, in thousandths.
const SUFFIXES: &[(&str, i128)] = &[
    ("", 1000),
    ("m", 1),
    ("k", 1000 * 1000),
    ("M", 1000 * 1000_i128.pow(2)),
    ("G", 1000 * 1000_i128.pow(3)),
    ("T", 1000 * 1000_i128.pow(4)),
    ("P", 1000 * 1000_i128.pow(5)),
    ("E", 1000 * 1000_i128.pow(6)),
    ("Ki", 1000 << 10),
    ("Mi", 1000 << 20),
    ("Gi", 1000 << 30),
    ("Ti", 1000 << 40),
    ("Pi", 1000 << 50),
    ("Ei", 1000 << 60),
];
/// Smaller than a thousandth: accepted, and rounded up as Kubernetes does.
const TINY_SUFFIXES: &[(&str, i128)] = &[("u", 1000), ("n", 1_000_000)];
/// More digits than any amount has.
const MAX_LENGTH: usize = 64;
const MAX_DIGITS: usize = 18;

impl Quantity {
    /// Reads a quantity as Kubernetes writes it.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::read(text).ok_or_else(|| {
            "is not a quantity: a number with an optional suffix (m, k, M, G, T, P, E, Ki, Mi, Gi, \
             Ti, Pi, Ei)"
                .to_owned()
        })
    }

    fn read(text: &str) -> Option<Self> {
        if text.len() > MAX_LENGTH {
            return None;
        }
        let (negative, rest) = match text.as_bytes().first()? {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, text),
        };
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = whole.len() + fraction.len();
        if digits == 0 || digits > MAX_DIGITS || fraction.contains('.') {
            return None;
        }
        let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
        let (mut up, mut down) = (
            1_i128,
            10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?,
        );
        if let Some((_, factor)) = SUFFIXES.iter().find(|(name, _)| *name == suffix) {
            up = *factor;
        } else if let Some((_, factor)) = TINY_SUFFIXES.iter().find(|(name, _)| *name == suffix) {
            down = down.checked_mul(*factor)?;
        } else {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
            up = 1000;
            if exponent < 0 {
                down = down.checked_mul(power)?;
            } else {
                up = up.checked_mul(power)?;
            }
        }
        let scaled = mantissa.checked_mul(up)?;
        let amount = scaled / down + i128::from(scaled % down != 0);
        Some(Self(if negative { -amount } else { amount }))
    }

    #[must_use]
    pub fn is_negative(self) -> bool {
        self.0 < 0
    }

    /// In thousandths: CPU.
    #[must_use]
    pub fn millis(self) -> u64 {
        u64::try_from(self.0.max(0)).unwrap_or(u64::MAX)
    }

    /// In whole units, rounded up: bytes.
    #[must_use]
    pub fn units(self) -> u64 {
        let amount = self.0.max(0);
        u64::try_from(amount / 1000 + i128::from(amount % 1000 != 0)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(text: &str) -> u64 {
        Quantity::parse(text).unwrap().units()
    }

    fn millis(text: &str) -> u64 {
        Quantity::parse(text).unwrap().millis()
    }

    #[test]
    fn all_suffixes_are_read() {
        assert_eq!(units("64Mi"), 64 << 20);
        assert_eq!(units("1.5Gi"), 3 << 29);
        assert_eq!(units("128974848"), 128_974_848);
        assert_eq!(units("129e6"), 129_000_000);
        assert_eq!(units("129E6"), 129_000_000);
        assert_eq!(units("129M"), 129_000_000);
        assert_eq!(units("1k"), 1000);
        assert_eq!(units("1Ei"), 1 << 60);
        assert_eq!(units("128974848000m"), 128_974_848);
        assert_eq!(millis("500m"), 500);
        assert_eq!(millis("0.1"), 100);
        assert_eq!(millis("2"), 2000);
        assert_eq!(millis("+2."), 2000);
        assert_eq!(millis(".5"), 500);
        assert_eq!(millis("1e-3"), 1);
    }

    #[test]
    fn parts_of_a_unit_are_rounded_up() {
        assert_eq!(millis("1u"), 1);
        assert_eq!(millis("1n"), 1);
        assert_eq!(units("1m"), 1);
    }

    #[test]
    fn other_texts_are_refused() {
        let refused = [
            "",
            "1Gib",
            "1 Gi",
            "Mi",
            "1.2.3",
            "--1",
            "1e",
            "1e99",
            "0x10",
            ".",
            "1g",
            "9".repeat(40).leak(),
        ];
        let read: Vec<_> = refused
            .into_iter()
            .filter(|text| Quantity::parse(text).is_ok())
            .collect();
        assert_eq!(read, Vec::<&str>::new());
    }

    #[test]
    fn negative_amounts_are_known_as_such() {
        assert!(Quantity::parse("-1").unwrap().is_negative());
        assert!(!Quantity::parse("0").unwrap().is_negative());
    }
}
