//! Finds the first difference of two specs, for people who open a known run with another spec.
use superbatch_proto::{
    reflect::{
        self, DynamicMessage, FieldDescriptor, Kind, OneofDescriptor, ReflectMessage, Value,
    },
    v1::RunSpec,
};

/// Longest text of a value, in characters.
const VALUE_CHARS_MAX: usize = 200;

/// A field in which two specs differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Such as `phases[1].sub_batch_size`.
    pub field: String,
    /// The two specs' values, for people.
    pub values: [String; 2],
}

impl Difference {
    fn below(self, at: &str) -> Self {
        let field = match self.field.chars().next() {
            None => at.to_owned(),
            Some('[') => format!("{at}{}", self.field),
            Some(_) => format!("{at}.{}", self.field),
        };
        Self { field, ..self }
    }
}

/// Returns the first field, in the protocol's order, in which two completed specs differ.
pub fn first_difference(a: &RunSpec, b: &RunSpec) -> Option<Difference> {
    let Difference { field, values } = of_messages(&reflect::dynamic(a), &reflect::dynamic(b))?;
    let values = values.map(|value| shortened(&value));
    Some(Difference { field, values })
}

fn shortened(value: &str) -> String {
    match value.char_indices().nth(VALUE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

/// Returns the first difference of two messages of one kind.
fn of_messages(a: &DynamicMessage, b: &DynamicMessage) -> Option<Difference> {
    let differs = |field: FieldDescriptor| match reflect::choice_of(&field) {
        Some(oneof) => of_choices(&oneof, a, b),
        None => {
            let [a, b] = [a, b].map(|message| reflect::given(message, &field));
            of_values(&field, a.as_ref(), b.as_ref()).map(|found| found.below(field.name()))
        }
    };
    reflect::in_order(&a.descriptor())
        .into_iter()
        .find_map(differs)
}

/// Compares a `oneof`, which is named as a whole: two choices of it have no field in common.
fn of_choices(
    oneof: &OneofDescriptor,
    a: &DynamicMessage,
    b: &DynamicMessage,
) -> Option<Difference> {
    let chosen = |message: &DynamicMessage| {
        let field = oneof.fields().find(|field| message.has_field(field))?;
        let value = reflect::given(message, &field)?;
        Some(format!("{}({})", field.name(), text(&field, &value)))
    };
    let [a, b] = [chosen(a), chosen(b)];
    (a != b).then(|| Difference {
        field: oneof.name().to_owned(),
        values: [a, b].map(or_nothing),
    })
}

/// Returns the first difference of two values of one field, with its path below that field.
fn of_values(field: &FieldDescriptor, a: Option<&Value>, b: Option<&Value>) -> Option<Difference> {
    match (a, b) {
        (Some(Value::Message(a)), Some(Value::Message(b))) => of_messages(a, b),
        (Some(Value::List(a)), Some(Value::List(b))) => (0..a.len().max(b.len())).find_map(|i| {
            let found = of_values(field, a.get(i), b.get(i))?;
            Some(found.below(&format!("[{i}]")))
        }),
        (a, b) => (a != b).then(|| Difference {
            field: String::new(),
            values: [a, b].map(|value| or_nothing(value.map(|value| text(field, value)))),
        }),
    }
}

fn or_nothing(value: Option<String>) -> String {
    value.unwrap_or_else(|| "nothing".to_owned())
}

/// Returns a value as people write it: enums as words, text in quotes, messages as JSON.
fn text(field: &FieldDescriptor, value: &Value) -> String {
    let plain = reflect::plain(field, value);
    match (field.kind(), plain.as_str()) {
        (Kind::Enum(_), Some(word)) => word.to_owned(),
        _ => plain.to_string(),
    }
}
