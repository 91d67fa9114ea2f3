//! Shared values on disk, as what they hold: for `#[serde(with = "shared")]`.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::selfplay::task::Task;

/// A value with shared parts, and the same without.
pub trait Shared: Sized {
    /// The value without.
    type Plain: Serialize + for<'a> Deserialize<'a>;
    /// A copy.
    fn plain(&self) -> Self::Plain;
    /// The value again.
    fn shared(plain: Self::Plain) -> Self;
}

impl Shared for Arc<[u32]> {
    type Plain = Vec<u32>;
    fn plain(&self) -> Vec<u32> {
        self.to_vec()
    }
    fn shared(plain: Vec<u32>) -> Self {
        plain.into()
    }
}

impl Shared for Arc<Task> {
    type Plain = Task;
    fn plain(&self) -> Task {
        Task::clone(self)
    }
    fn shared(plain: Task) -> Self {
        plain.into()
    }
}

impl<T: Shared> Shared for Vec<T> {
    type Plain = Vec<T::Plain>;
    fn plain(&self) -> Self::Plain {
        self.iter().map(T::plain).collect()
    }
    fn shared(plain: Self::Plain) -> Self {
        plain.into_iter().map(T::shared).collect()
    }
}

impl<T: Shared> Shared for Option<T> {
    type Plain = Option<T::Plain>;
    fn plain(&self) -> Self::Plain {
        self.as_ref().map(T::plain)
    }
    fn shared(plain: Self::Plain) -> Self {
        plain.map(T::shared)
    }
}

/// Writes what a shared value holds.
///
/// # Errors
/// Those of the writer.
pub fn serialize<T: Shared, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    value.plain().serialize(to)
}

/// Reads a value that is shared again.
///
/// # Errors
/// When it is not what it should be.
pub fn deserialize<'a, T: Shared, D: Deserializer<'a>>(from: D) -> Result<T, D::Error> {
    T::Plain::deserialize(from).map(T::shared)
}
