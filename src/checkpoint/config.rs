//! Access to `config.json` with errors that name the key.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::error::CheckpointError;
use super::files::read_json;

/// Where multimodal models keep the description of their language model.
const LANGUAGE_MODELS: [&str; 5] =
    ["text_config", "language_config", "llm_config", "thinker_config", "backbone_config"];

/// The part of `config.json` that describes the language model.
pub struct Config {
    /// From the whole model to the language model within.
    model_types: Vec<String>,
    values: Value,
    /// Keys that were asked for.
    read: RefCell<BTreeSet<String>>,
}

impl Config {
    /// Reads `config.json` of a checkpoint folder.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Json`], [`CheckpointError::Config`] where it names no `model_type`.
    pub fn open(folder: &Path) -> Result<Config, CheckpointError> {
        Config::from_json(read_json(&folder.join("config.json"))?)
    }

    /// The innermost object that describes a language model: the value itself, or in a multimodal model one within.
    ///
    /// # Errors
    /// [`CheckpointError::Config`] where there is no `model_type`.
    pub fn from_json(mut values: Value) -> Result<Config, CheckpointError> {
        if !values.is_object() {
            return Err(CheckpointError::config("model_type", "is missing: the file holds no JSON object"));
        }
        let mut model_types = Vec::new();
        loop {
            match values.get("model_type") {
                Some(Value::String(name)) => model_types.push(name.clone()),
                Some(other) => {
                    return Err(CheckpointError::config("model_type", format!("is {other}, expected a string")));
                }
                None if model_types.is_empty() => return Err(CheckpointError::config("model_type", "is missing")),
                None => {}
            }
            let inner = LANGUAGE_MODELS.into_iter().find(|key| values.get(key).is_some_and(Value::is_object));
            let Some(inner) = inner else { break };
            values = values[inner].take();
        }
        Ok(Config { model_types, values, read: RefCell::default() })
    }

    /// The same configuration, of which nothing has been asked for.
    pub(super) fn fresh(&self) -> Config {
        Config { model_types: self.model_types.clone(), values: self.values.clone(), read: RefCell::default() }
    }

    /// The `model_type` of the whole model.
    pub fn model_type(&self) -> &str {
        &self.model_types[0]
    }

    /// Every `model_type`, from that of the language model to that of the whole.
    pub fn model_types(&self) -> impl Iterator<Item = &str> {
        self.model_types.iter().rev().map(String::as_str)
    }

    /// The value of a key, or of one within an object (`ffn_config.moe_top_k`).
    fn get(&self, key: &str) -> Option<&Value> {
        let mut parts = key.split('.');
        let first = parts.next().unwrap_or(key);
        self.read.borrow_mut().insert(first.to_owned());
        let value = parts.try_fold(self.values.get(first)?, |value, part| value.get(part));
        value.filter(|value| !value.is_null())
    }

    /// The keys that nothing has asked for, with their values; null is no value.
    pub(super) fn unread(&self) -> impl Iterator<Item = (&str, &Value)> {
        let entries = self.values.as_object().into_iter().flatten();
        let unread = entries.filter(|(key, value)| !value.is_null() && !self.read.borrow().contains(*key));
        unread.map(|(key, value)| (key.as_str(), value))
    }

    /// Keys that are there and that nothing has asked for, and those that were asked for and are not there.
    pub(super) fn strange(&self) -> usize {
        let absent = self.read.borrow().iter().filter(|key| self.values.get(key.as_str()).is_none()).count();
        self.unread().count() + absent
    }

    /// Notes that the family knows these keys and that they do not matter.
    pub(super) fn disregard(&self, keys: &[&str]) {
        self.read.borrow_mut().extend(keys.iter().map(|&key| key.to_owned()));
    }

    /// Of several spellings of a key the first that is there, else the first.
    pub(super) fn spelling<'a>(&self, keys: &[&'a str]) -> &'a str {
        keys.iter().copied().find(|key| self.has(key)).unwrap_or(keys[0])
    }

    /// A count of at least 1, one number or one for each layer, that has several spellings: where more than one is there, they must agree.
    pub(super) fn size_of_layer(&self, keys: &[&str], layer: usize) -> Result<usize, CheckpointError> {
        let key = self.spelling(keys);
        let number = self.count_of_layer(key, layer)?.ok_or_else(|| CheckpointError::config(key, "is missing"))?;
        for other in keys {
            if let Some(value) = self.count_of_layer(other, layer)?.filter(|&value| value != number) {
                return Err(CheckpointError::config(key, format!("is {number}, and `{other}` is {value}")));
            }
        }
        if number == 0 { Err(CheckpointError::config(key, "is 0, expected at least 1")) } else { Ok(number) }
    }

    /// A count that may be absent or 0.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        self.get(key).map(|value| as_count(key, value)).transpose()
    }

    /// A count that is either one number or a list with one for each layer.
    pub(super) fn count_of_layer(&self, key: &str, layer: usize) -> Result<Option<usize>, CheckpointError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => {
                let value = list.get(layer).ok_or_else(|| {
                    CheckpointError::config(key, format!("has {} entries, none for layer {layer}", list.len()))
                })?;
                as_count(key, value).map(Some)
            }
            Some(value) => as_count(key, value).map(Some),
        }
    }

    /// Whether the key is there and not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Fails unless the flag is absent or has the only value that is computed here.
    pub(super) fn require_flag(&self, key: &str, expected: bool, why: &str) -> Result<(), CheckpointError> {
        match self.flag(key, expected)? {
            found if found != expected => {
                Err(CheckpointError::config(key, format!("is {found}, expected {expected}: {why}")))
            }
            _ => Ok(()),
        }
    }

    /// Fails unless the text is absent or the only one that is computed here.
    pub(super) fn require_text(&self, key: &str, expected: &str) -> Result<(), CheckpointError> {
        match self.text(key, expected)? {
            found if found != expected => {
                Err(CheckpointError::config(key, format!("is {found:?}, expected {expected:?}")))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, CheckpointError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(CheckpointError::config(key, format!("is {other}, expected true or false"))),
        }
    }

    /// A number of a layer in a list with one for each, or null; none where there is no list.
    pub(super) fn number_of_layer(&self, key: &str, layer: usize) -> Result<Option<f64>, CheckpointError> {
        let wrong = |value: &Value| CheckpointError::config(key, format!("is {value}, expected a list of numbers"));
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => match list.get(layer) {
                None => {
                    let reason = format!("has {} entries, none for layer {layer}", list.len());
                    Err(CheckpointError::config(key, reason))
                }
                Some(Value::Null) => Ok(None),
                Some(value) => {
                    let number = value.as_f64().filter(|number| (*number as f32).is_finite());
                    number.map(Some).ok_or_else(|| wrong(value))
                }
            },
            Some(value) => Err(wrong(value)),
        }
    }

    /// A number, none where the key is there and null.
    pub(super) fn null_or_number(&self, key: &str, default: f64) -> Result<Option<f64>, CheckpointError> {
        let (object, last) = key.rsplit_once('.').unwrap_or(("", key));
        let values = if object.is_empty() { Some(&self.values) } else { self.get(object) };
        if values.and_then(|values| values.get(last)).is_some_and(Value::is_null) {
            return Ok(None);
        }
        self.number(key, default).map(Some)
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64, CheckpointError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().filter(|&number| (number as f32).is_finite()).ok_or_else(|| {
                CheckpointError::config(key, format!("is {value}, expected a number that f32 can hold"))
            }),
        }
    }

    pub(super) fn text<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str, CheckpointError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(CheckpointError::config(key, format!("is {other}, expected a string"))),
        }
    }
}

fn as_count(key: &str, value: &Value) -> Result<usize, CheckpointError> {
    value
        .as_u64()
        .and_then(|number| usize::try_from(number).ok())
        // Far beyond every model, and products of two still fit.
        .filter(|&number| number <= u32::MAX as usize)
        .ok_or_else(|| CheckpointError::config(key, format!("is {value}, expected a count")))
}
