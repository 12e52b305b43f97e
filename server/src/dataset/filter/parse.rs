//! From a predicate's text to its expression: comparisons, `in`, `is null`, `between`, joined by
//! `and`, `or`, `not` and parentheses, with SQL's precedence.
use super::{
    expression::{Expression, Literal, Name, Operator},
    words::{Fault, What, Word, words},
};
use crate::bounds::NAME_BYTES_MAX;

/// Parentheses and `not` inside each other.
const DEPTH_MAX: usize = 32;
/// Bytes of a text. Comparisons that are joined lie within each other, and a stack has an end.
const BYTES_MAX: usize = NAME_BYTES_MAX;

/// Parses `text`.
///
/// # Errors
/// What is wrong, and at which character.
pub(crate) fn parse(text: &str) -> Result<Expression, Fault> {
    if text.len() > BYTES_MAX {
        let bytes = text.len();
        let what = format!("the text has {bytes} bytes, and at most {BYTES_MAX} are read");
        return Err(Fault::new(1, what));
    }
    let mut parser = Parser {
        words: words(text)?,
        next: 0,
        depth: 0,
    };
    let expression = parser.or()?;
    match parser.peek() {
        What::End => Ok(expression),
        _ => Err(parser.expected("'and', 'or' or the end")),
    }
}

struct Parser {
    words: Vec<Word>,
    next: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> &What {
        &self.words[self.next].what
    }

    fn at(&self) -> usize {
        self.words[self.next].at
    }

    /// Takes a word, unless it is the end.
    fn take(&mut self) -> What {
        let what = self.peek().clone();
        self.next += usize::from(what != What::End);
        what
    }

    fn expected(&self, what: &str) -> Fault {
        let found = match self.peek() {
            What::End => "the text ends".to_owned(),
            What::Name(name, _) => format!("'{name}' stands"),
            What::Literal(literal) => format!("{literal} stands"),
            What::Sign(sign) => format!("'{sign}' stands"),
        };
        Fault::new(self.at(), format!("{found} where {what} is expected"))
    }

    /// Takes a keyword, if it comes next.
    fn keyword(&mut self, word: &str) -> bool {
        let is = matches!(self.peek(), What::Name(name, false) if name.eq_ignore_ascii_case(word));
        self.next += usize::from(is);
        is
    }

    fn sign(&mut self, sign: &str) -> bool {
        let is = matches!(self.peek(), What::Sign(found) if *found == sign);
        self.next += usize::from(is);
        is
    }

    fn need_sign(&mut self, sign: &str) -> Result<(), Fault> {
        if self.sign(sign) {
            Ok(())
        } else {
            Err(self.expected(&format!("'{sign}'")))
        }
    }

    fn or(&mut self) -> Result<Expression, Fault> {
        let mut left = self.and()?;
        while self.keyword("or") {
            left = Expression::Or(Box::new([left, self.and()?]));
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expression, Fault> {
        let mut left = self.not()?;
        while self.keyword("and") {
            left = Expression::And(Box::new([left, self.not()?]));
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expression, Fault> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            let what = format!("more than {DEPTH_MAX} parentheses and 'not' inside each other");
            return Err(Fault::new(self.at(), what));
        }
        let found = if self.keyword("not") {
            Expression::Not(Box::new(self.not()?))
        } else if self.sign("(") {
            let inner = self.or()?;
            self.need_sign(")")?;
            inner
        } else {
            self.comparison()?
        };
        self.depth -= 1;
        Ok(found)
    }

    fn comparison(&mut self) -> Result<Expression, Fault> {
        if let What::Literal(literal) = self.peek().clone() {
            self.next += 1;
            let operator = self.operator()?.turned();
            return Ok(Expression::Compare(self.name()?, operator, literal));
        }
        let name = self.name()?;
        if self.keyword("is") {
            let negated = self.keyword("not");
            return if self.keyword("null") {
                Ok(negate(negated, Expression::IsNull(name)))
            } else {
                Err(self.expected("'null'"))
            };
        }
        let negated = self.keyword("not");
        if self.keyword("in") {
            return Ok(negate(negated, Expression::In(name, self.list()?)));
        }
        if self.keyword("between") {
            let low = self.literal()?;
            if !self.keyword("and") {
                return Err(self.expected("'and'"));
            }
            let high = self.literal()?;
            let low = Expression::Compare(name.clone(), Operator::GreaterOrEqual, low);
            let high = Expression::Compare(name, Operator::LessOrEqual, high);
            return Ok(negate(negated, Expression::And(Box::new([low, high]))));
        }
        if negated {
            Err(self.expected("'in' or 'between'"))
        } else {
            Ok(Expression::Compare(name, self.operator()?, self.literal()?))
        }
    }

    fn list(&mut self) -> Result<Vec<Literal>, Fault> {
        self.need_sign("(")?;
        let mut literals = vec![self.literal()?];
        while self.sign(",") {
            literals.push(self.literal()?);
        }
        self.need_sign(")")?;
        Ok(literals)
    }

    fn name(&mut self) -> Result<Name, Fault> {
        let at = self.at();
        match self.peek().clone() {
            What::Name(name, quoted) if quoted || !is_keyword(&name) => {
                self.next += 1;
                Ok(Name { name, at })
            }
            _ => Err(self.expected("the name of a column")),
        }
    }

    fn operator(&mut self) -> Result<Operator, Fault> {
        let found = match self.peek() {
            What::Sign(sign) => Operator::of(sign),
            _ => None,
        };
        let what = "one of = != < <= > >=, 'in', 'between' or 'is null'";
        let operator = found.ok_or_else(|| self.expected(what))?;
        self.next += 1;
        Ok(operator)
    }

    fn literal(&mut self) -> Result<Literal, Fault> {
        match self.peek() {
            What::Literal(_) => match self.take() {
                What::Literal(literal) => Ok(literal),
                _ => Err(self.expected("a value")),
            },
            _ => Err(self.expected("a number, a text in '…', true or false")),
        }
    }
}

fn negate(negated: bool, expression: Expression) -> Expression {
    if negated {
        Expression::Not(Box::new(expression))
    } else {
        expression
    }
}

fn is_keyword(name: &str) -> bool {
    let words = ["and", "or", "not", "in", "is", "null", "between", "like"];
    words.iter().any(|word| name.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The outcome for `a`, `b` and the text `t`.
    fn outcome(text: &str, a: Option<i128>, b: Option<f64>, t: Option<&str>) -> Option<bool> {
        let a = a.map(Literal::Int);
        let b = b.map(Literal::Float);
        let t = t.map(|t| Literal::Text(t.to_owned()));
        let value = |name: &str| match name {
            "a" => a.as_ref(),
            "b" => b.as_ref(),
            _ => t.as_ref(),
        };
        parse(text).unwrap().outcome(&value)
    }

    #[test]
    fn precedence_is_sqls() {
        for (text, expected) in [
            ("a = 1 or a = 2 and b = 9", true),
            ("(a = 1 or a = 2) and b = 9", false),
            ("not a = 2 and b < 1", true),
            ("not (a = 1 and b < 1)", false),
            ("0.3 < b AND 1 >= a", true),
            ("a between 1 and 3 and t = 'x'", true),
            ("t not in ('y', 'z') and t <> 'w'", true),
            ("\"a\" is not null", true),
        ] {
            assert_eq!(
                outcome(text, Some(1), Some(0.5), Some("x")),
                Some(expected),
                "{text}"
            );
        }
    }

    #[test]
    fn nulls_are_as_in_sql() {
        for (text, expected) in [
            ("a = 1", None),
            ("a != 1", None),
            ("not a = 1", None),
            ("a = 1 or b < 1", Some(true)),
            ("a = 1 and b > 1", Some(false)),
            ("a in (1, 2)", None),
            ("a not in (1, 2)", None),
            ("a is null", Some(true)),
            ("t is null or a > 0", None),
        ] {
            assert_eq!(
                outcome(text, None, Some(0.5), Some("x")),
                expected,
                "{text}"
            );
        }
        assert_eq!(outcome("b < 1 or b >= 1", None, Some(f64::NAN), None), None);
    }

    #[test]
    fn what_is_no_predicate_is_told_with_its_place() {
        for (text, at, what) in [
            ("", 1, "the text ends where the name of a column"),
            ("similarity > ", 14, "the text ends where a number"),
            ("similarity 0.3", 12, "0.3 stands where one of ="),
            ("a = 1 b = 2", 7, "'b' stands where 'and', 'or' or the end"),
            ("a = b", 5, "'b' stands where a number"),
            ("a in 1", 6, "'('"),
            ("a like 'x%'", 3, "'like' stands"),
            ("(a = 1", 7, "')'"),
            ("a is 3", 6, "'null'"),
        ] {
            let fault = parse(text).unwrap_err();
            assert_eq!(fault.at, at, "{text}: {fault:?}");
            assert!(fault.what.contains(what), "{text}: {fault:?}");
        }
        let deep = "(".repeat(1_000);
        assert!(parse(&deep).unwrap_err().what.contains("inside each other"));
        let long = format!("a = 1{}", " or a = 1".repeat(100_000));
        let fault = parse(&long).unwrap_err();
        assert!(fault.what.contains("900005 bytes"), "{fault:?}");
    }
}
