//! Messages by the names of their fields, for code that treats all fields alike.
use crate::v1::FILE_DESCRIPTOR_SET;
use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DeserializeOptions, SerializeOptions};
pub use prost_reflect::{
    DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor, OneofDescriptor,
    ReflectMessage, Value,
};
use std::sync::LazyLock;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the protocol describes itself")
});

/// Returns a message whose fields can be walked.
pub fn dynamic<M: Message + Name>(message: &M) -> DynamicMessage {
    let mut dynamic = empty::<M>();
    dynamic
        .transcode_from(message)
        .expect("a message is one of its own kind");
    dynamic
}

fn empty<M: Name>() -> DynamicMessage {
    let name = M::full_name();
    DynamicMessage::new(
        POOL.get_message_by_name(&name)
            .expect("the protocol's messages are all described"),
    )
}

/// Returns the fields of a message in the protocol's order.
pub fn in_order(of: &MessageDescriptor) -> Vec<FieldDescriptor> {
    let mut fields: Vec<FieldDescriptor> = of.fields().collect();
    fields.sort_by_key(FieldDescriptor::number);
    fields
}

/// Returns the `oneof` that a field is a choice of.
pub fn choice_of(field: &FieldDescriptor) -> Option<OneofDescriptor> {
    field
        .containing_oneof()
        .filter(|oneof| !oneof.is_synthetic())
}

/// Returns a field's value; `None` if the field has presence and is not set.
pub fn given(message: &DynamicMessage, field: &FieldDescriptor) -> Option<Value> {
    let is_set = !field.supports_presence() || message.has_field(field);
    is_set.then(|| message.get_field(field).into_owned())
}

/// Returns the fields in the protocol's order, each with its value: `None` if it has presence
/// and is not set. Of a `oneof` only what is set.
pub fn fields(message: &DynamicMessage) -> impl Iterator<Item = (FieldDescriptor, Option<Value>)> {
    in_order(&message.descriptor())
        .into_iter()
        .filter_map(|field| {
            let value = given(message, &field);
            (value.is_some() || choice_of(&field).is_none()).then_some((field, value))
        })
}

/// Returns `POLICY_JOINT` as `joint`. `None` for a number that this version has no name for.
pub fn word(of: &EnumDescriptor, number: i32) -> Option<String> {
    let value = of.get_value(number)?;
    Some(without_prefix(value.name(), of.default_value().name()))
}

/// Removes the enum's name: all values of an enum begin with its name, as its zero does:
/// `POLICY_UNSPECIFIED`.
fn without_prefix(name: &str, zero: &str) -> String {
    let prefix = zero.trim_end_matches("UNSPECIFIED");
    name.trim_start_matches(prefix).to_lowercase()
}

/// A value of an enum as people write it.
pub trait Word {
    /// Returns `joint` for `POLICY_JOINT`.
    fn word(self) -> String;
}

macro_rules! words {
    ($($of:ident),* $(,)?) => {
        $(impl Word for crate::v1::$of {
            fn word(self) -> String {
                without_prefix(self.as_str_name(), Self::default().as_str_name())
            }
        })*
    };
}

words!(
    BadRowReason,
    Criterion,
    Delivery,
    Fidelity,
    Loss,
    Mode,
    Policy,
    Reason,
    RunState,
    WeightsState,
);

/// Returns the message as JSON for people: field names of the protocol, enums as [`word`]s, bytes
/// in hex, null for what is not set.
pub fn to_plain_json<M: Message + Name>(message: &M) -> serde_json::Value {
    plain_message(&dynamic(message))
}

fn plain_message(message: &DynamicMessage) -> serde_json::Value {
    let plain = |(field, value): (FieldDescriptor, Option<Value>)| {
        let value = value.map_or(serde_json::Value::Null, |value| plain(&field, &value));
        (field.name().to_owned(), value)
    };
    serde_json::Value::Object(fields(message).map(plain).collect())
}

/// Returns one value as [`to_plain_json`] writes it.
pub fn plain(field: &FieldDescriptor, value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(value) => (*value).into(),
        Value::I32(value) => (*value).into(),
        Value::I64(value) => (*value).into(),
        Value::U32(value) => (*value).into(),
        Value::U64(value) => (*value).into(),
        Value::F32(value) => (*value).into(),
        Value::F64(value) => (*value).into(),
        Value::String(value) => value.as_str().into(),
        Value::Bytes(value) => value
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
            .into(),
        Value::EnumNumber(number) => match field.kind() {
            Kind::Enum(of) => word(&of, *number).map_or((*number).into(), Into::into),
            _ => (*number).into(),
        },
        Value::Message(message) => plain_message(message),
        Value::List(items) => items.iter().map(|item| plain(field, item)).collect(),
        // Keys of the protocol's maps are text.
        Value::Map(entries) => entries
            .iter()
            .filter_map(|(key, value)| Some((key.as_str()?.to_owned(), plain(field, value))))
            .collect(),
    }
}

/// Returns the message as protobuf's own JSON, for keeping: fields that hold their default are left
/// out.
pub fn to_json<M: Message + Name>(message: &M) -> serde_json::Value {
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .stringify_64_bit_integers(false);
    dynamic(message)
        .serialize_with_options(serde_json::value::Serializer, &options)
        .expect("a message is plain data")
}

/// Reads a message from its JSON, as [`to_json`] writes it.
///
/// # Errors
/// What is wrong, with the field that this version does not know.
pub fn from_json<M: Message + Name + Default>(
    json: serde_json::Value,
) -> Result<M, serde_json::Error> {
    let dynamic = DynamicMessage::deserialize_with_options(
        empty::<M>().descriptor(),
        json,
        &DeserializeOptions::new(),
    )?;
    dynamic
        .transcode_to()
        .map_err(<serde_json::Error as serde::de::Error>::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{Approximation, ChosenRow, Phase, Policy, RunSpec, approximation::By};
    use serde_json::json;

    #[test]
    fn a_message_comes_back_from_its_json_to_the_last_bit() {
        let phase = Phase {
            policy: Policy::Joint.into(),
            from_step: u64::MAX,
            gain: 0.1 + 0.2,
            approximation: Some(Approximation {
                by: Some(By::Resolution(112)),
            }),
            ..Phase::default()
        };
        let spec = RunSpec {
            seed: u64::MAX,
            columns: vec!["é".into()],
            phases: vec![phase],
            ..RunSpec::default()
        };
        let json = to_json(&spec);
        assert_eq!(json["phases"][0]["policy"], json!("POLICY_JOINT"));
        assert_eq!(from_json::<RunSpec>(json).unwrap(), spec);
        assert!(from_json::<RunSpec>(json!({"sede": 1})).is_err());
    }

    #[test]
    fn numbers_come_back_from_text_to_the_last_bit() {
        for n in 1..5000 {
            let gain = f64::from(n).sqrt().recip();
            let phase = Phase {
                gain,
                ..Phase::default()
            };
            let text = to_json(&phase).to_string();
            let read = serde_json::from_str(&text).unwrap();
            assert_eq!(from_json::<Phase>(read).unwrap().gain, gain, "{text}");
        }
    }

    #[test]
    fn plain_json_names_everything_and_shortens_enums() {
        let row = ChosenRow {
            content_hash: vec![1, 0xab].into(),
            ..ChosenRow::default()
        };
        let plain = to_plain_json(&row);
        assert_eq!(plain["content_hash"], json!("01ab"));
        assert_eq!(plain["fidelity"], json!("unspecified"));
        assert_eq!(plain["own_score"], json!(null), "it is optional");
        assert_eq!(to_plain_json(&Approximation::default()), json!({}));
        assert_eq!(Policy::JointTopK.word(), "joint_top_k");
    }
}
