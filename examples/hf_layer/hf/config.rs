//! Access to `config.json` with errors that name the key.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::error::HfError;
use super::files::read_json;

/// The part of `config.json` that describes the language model.
pub struct Config {
    model_type: String,
    values: Value,
    /// Keys that were asked for.
    read: RefCell<BTreeSet<String>>,
}

impl Config {
    /// Reads `config.json` of a checkpoint folder; of a multimodal model the nested `text_config`.
    pub fn open(folder: &Path) -> Result<Config, HfError> {
        Config::from_json(read_json(&folder.join("config.json"))?)
    }

    pub fn from_json(mut values: Value) -> Result<Config, HfError> {
        if !values.is_object() {
            return Err(HfError::config("model_type", "is missing: the file holds no JSON object"));
        }
        let model_type = match values.get("model_type") {
            Some(Value::String(name)) => name.clone(),
            Some(other) => return Err(HfError::config("model_type", format!("is {other}, expected a string"))),
            None => return Err(HfError::config("model_type", "is missing")),
        };
        if values.get("text_config").is_some_and(Value::is_object) {
            values = values["text_config"].take();
        }
        Ok(Config { model_type, values, read: RefCell::default() })
    }

    pub fn model_type(&self) -> &str {
        &self.model_type
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// A count of at least 1.
    pub fn size(&self, key: &str) -> Result<usize, HfError> {
        self.size_of(&[key])
    }

    /// The keys that nothing has asked for, with their values; null is no value.
    pub fn unread(&self) -> impl Iterator<Item = (&str, &Value)> {
        let entries = self.values.as_object().into_iter().flatten();
        let unread = entries.filter(|(key, value)| !value.is_null() && !self.read.borrow().contains(*key));
        unread.map(|(key, value)| (key.as_str(), value))
    }

    /// Notes that the family knows these keys and that they do not matter.
    pub fn disregard(&self, keys: &[&str]) {
        self.read.borrow_mut().extend(keys.iter().map(|&key| key.to_owned()));
    }

    /// Of several spellings of a key the first that is there, else the first.
    pub fn spelling<'a>(&self, keys: &[&'a str]) -> &'a str {
        keys.iter().copied().find(|key| self.has(key)).unwrap_or(keys[0])
    }

    /// A count of at least 1 that has several spellings: where more than one is there, they must agree.
    pub fn size_of(&self, keys: &[&str]) -> Result<usize, HfError> {
        let key = self.spelling(keys);
        let number = self.count(key)?.ok_or_else(|| HfError::config(key, "is missing"))?;
        for other in keys {
            if let Some(value) = self.count(other)?.filter(|&value| value != number) {
                return Err(HfError::config(key, format!("is {number}, and `{other}` is {value}")));
            }
        }
        if number == 0 { Err(HfError::config(key, "is 0, expected at least 1")) } else { Ok(number) }
    }

    /// A count that may be absent or 0.
    pub fn count(&self, key: &str) -> Result<Option<usize>, HfError> {
        self.get(key).map(|value| as_count(key, value)).transpose()
    }

    /// A count that is either one number or a list with one for each layer.
    pub fn count_of_layer(&self, key: &str, layer: usize) -> Result<Option<usize>, HfError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => {
                let value = list.get(layer).ok_or_else(|| {
                    HfError::config(key, format!("has {} entries, none for layer {layer}", list.len()))
                })?;
                as_count(key, value).map(Some)
            }
            Some(value) => as_count(key, value).map(Some),
        }
    }

    /// A list of counts, empty where absent.
    pub fn counts(&self, key: &str) -> Result<Vec<usize>, HfError> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(|value| as_count(key, value)).collect(),
            Some(other) => Err(HfError::config(key, format!("is {other}, expected a list"))),
        }
    }

    /// Whether the key is there and not null.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// An integer that may be negative (`-1` for "the last").
    pub fn integer(&self, key: &str) -> Result<Option<i64>, HfError> {
        self.get(key)
            .map(|value| value.as_i64().ok_or_else(|| HfError::config(key, format!("is {value}, expected an integer"))))
            .transpose()
    }

    /// Fails unless the flag is absent or has the only value that is computed here.
    pub fn require_flag(&self, key: &str, expected: bool, why: &str) -> Result<(), HfError> {
        match self.flag(key, expected)? {
            found if found != expected => Err(HfError::config(key, format!("is {found}, expected {expected}: {why}"))),
            _ => Ok(()),
        }
    }

    /// Fails unless the text is absent or the only one that is computed here.
    pub fn require_text(&self, key: &str, expected: &str) -> Result<(), HfError> {
        match self.text(key, expected)? {
            found if found != expected => Err(HfError::config(key, format!("is {found:?}, expected {expected:?}"))),
            _ => Ok(()),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool, HfError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(HfError::config(key, format!("is {other}, expected true or false"))),
        }
    }

    pub fn number(&self, key: &str, default: f64) -> Result<f64, HfError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|&number| (number as f32).is_finite())
                .ok_or_else(|| HfError::config(key, format!("is {value}, expected a number that f32 can hold"))),
        }
    }

    pub fn text<'a>(&'a self, key: &str, default: &'a str) -> Result<&'a str, HfError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(HfError::config(key, format!("is {other}, expected a string"))),
        }
    }
}

fn as_count(key: &str, value: &Value) -> Result<usize, HfError> {
    value
        .as_u64()
        .and_then(|number| usize::try_from(number).ok())
        // Far beyond every model, and products of two still fit.
        .filter(|&number| number <= u32::MAX as usize)
        .ok_or_else(|| HfError::config(key, format!("is {value}, expected a count")))
}
