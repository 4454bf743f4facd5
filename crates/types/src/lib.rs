//! Names and numbers that every Steadfast crate shares: newtypes only, no I/O, no clock.
//!
//! The vocabulary is that of `ARCHITECTURE.md`. An [`Epoch`] is the interval between two cuts of a VM; a
//! [`Term`] is the fencing number that grows by one each time the right to run a VM changes hands.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// Nothing yet: the value before the first.
            pub const ZERO: Self = Self(0);

            /// The one after this. Saturates at the maximum, which no run can reach.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }

            /// The one before this; zero stays zero.
            #[must_use]
            pub const fn prev(self) -> Self {
                Self(self.0.saturating_sub(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

counter!(
    /// Number of an epoch of one VM: 1, 2, 3, ... Zero means that nothing was sealed yet.
    Epoch
);
counter!(
    /// Fencing number of a VM. A higher term always wins; a term is never used twice.
    Term
);

impl Epoch {
    /// No VM gets here: a thousand epochs a second for two million years. What says so is broken.
    pub const LIMIT: Self = Self(1 << 56);
}

impl Term {
    /// No VM gets here: a failover every millisecond for two years. What says so is broken.
    pub const LIMIT: Self = Self(1 << 36);
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and takes a name: 1 to 63 characters of `a-z A-Z 0-9 . _ -`, starting with a letter or digit.
            ///
            /// # Errors
            /// [`BadName`] says which rule was broken.
            pub fn new(name: impl Into<String>) -> Result<Self, BadName> {
                let name = name.into();
                check_name(&name).map(|()| Self(name))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadName;
            fn try_from(s: String) -> Result<Self, BadName> {
                Self::new(s)
            }
        }

        impl std::str::FromStr for $name {
            type Err = BadName;
            fn from_str(s: &str) -> Result<Self, BadName> {
                Self::new(s)
            }
        }

        impl From<$name> for String {
            fn from(n: $name) -> String {
                n.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// Name of a VM, unique in its pool.
    VmId
);
name!(
    /// Name of a host, unique in its pool.
    HostId
);
name!(
    /// Name of a site: where hosts stand that one disaster can hit together.
    SiteId
);
name!(
    /// Name of a placement group of VMs.
    GroupId
);
name!(
    /// Name of an application: several VMs managed as one.
    AppId
);

/// A name that is not usable as a [`VmId`], [`HostId`] or another name of this crate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Empty, or longer than 63 characters.
    #[error("the name {0:?} has {1} characters; use 1 to 63")]
    Length(String, usize),
    /// A character that is not allowed, or not allowed in front.
    #[error("the name {0:?} has {1:?}; use letters, digits, '.', '_' and '-', a letter or digit first")]
    Character(String, char),
}

fn check_name(name: &str) -> Result<(), BadName> {
    let count = name.chars().count();
    if count == 0 || count > 63 {
        return Err(BadName::Length(name.chars().take(80).collect(), count));
    }
    for (i, c) in name.chars().enumerate() {
        let ok = c.is_ascii_alphanumeric() || (i > 0 && matches!(c, '.' | '_' | '-'));
        if !ok {
            return Err(BadName::Character(name.to_owned(), c));
        }
    }
    Ok(())
}

/// Size of a guest page in bytes; the unit of memory replication.
pub const PAGE_SIZE: u64 = 4096;

/// Guest physical page number: address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Gfn(pub u64);

impl Gfn {
    /// Guest physical address of the first byte of the page.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0.saturating_mul(PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!(VmId::new("db-1.prod").is_ok());
        assert!(matches!(VmId::new(""), Err(BadName::Length(_, 0))));
        assert!(matches!(HostId::new("../etc"), Err(BadName::Character(_, '.'))));
        assert!(matches!(HostId::new("a/b"), Err(BadName::Character(_, '/'))));
        assert!(VmId::new("x".repeat(64)).is_err());
    }

    #[test]
    fn counters_grow_by_one() {
        assert_eq!(Epoch::ZERO.next(), Epoch(1));
        assert_eq!(Epoch(7).prev(), Epoch(6));
        assert_eq!(Term::ZERO.prev(), Term::ZERO);
    }
}
