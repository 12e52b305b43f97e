{{/* Names, labels and ports. */}}

{{- define "superbatch.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "superbatch.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "superbatch.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "superbatch.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* The name of a role's objects. (list root role) */}}
{{- define "superbatch.roleName" -}}
{{- printf "%s-%s" (include "superbatch.fullname" (first .)) (last .) -}}
{{- end -}}

{{/* What never changes of a role's pods. (list root role) */}}
{{- define "superbatch.selector" -}}
app.kubernetes.io/name: {{ include "superbatch.name" (first .) }}
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end -}}

{{- define "superbatch.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: superbatch
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of an object. (list root component) */}}
{{- define "superbatch.labels" -}}
{{ include "superbatch.selector" . }}
{{ include "superbatch.commonLabels" (first .) }}
{{- end -}}

{{- define "superbatch.serviceAccount" -}}
{{- $account := (get (first .).Values (last .)).serviceAccount -}}
{{- if $account.create -}}
{{- default (include "superbatch.roleName" .) $account.name -}}
{{- else -}}
{{- default "default" $account.name -}}
{{- end -}}
{{- end -}}

{{/* (list root image) */}}
{{- define "superbatch.image" -}}
{{- $root := first . -}}
{{- $image := last . -}}
{{- $name := $image.repository -}}
{{- with $root.Values.imageRegistry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "superbatch.scheme" -}}
{{- ternary "https" "http" .Values.tls.enabled -}}
{{- end -}}

{{/* The coordinator's name within the cluster, and its whole address. */}}
{{- define "superbatch.coordinatorHost" -}}
{{- printf "%s.%s.svc.%s" (include "superbatch.roleName" (list . "coordinator")) .Release.Namespace .Values.clusterDomain -}}
{{- end -}}

{{- define "superbatch.coordinatorUri" -}}
{{- printf "%s://%s:%v" (include "superbatch.scheme" .) (include "superbatch.coordinatorHost" .) .Values.coordinator.service.port -}}
{{- end -}}

{{- define "superbatch.tlsSecret" -}}
{{- if eq .Values.tls.source "secret" -}}
{{- .Values.tls.existingSecret -}}
{{- else -}}
{{- printf "%s-tls" (include "superbatch.fullname" .) -}}
{{- end -}}
{{- end -}}

{{/* The Secret of the certificate that trainers show; empty where nobody asks for one, or where it is not known. */}}
{{- define "superbatch.clientTlsSecret" -}}
{{- if and .Values.tls.enabled .Values.tls.requireClientCertificates -}}
{{- if eq .Values.tls.source "secret" -}}
{{- .Values.tls.existingClientSecret -}}
{{- else -}}
{{- printf "%s-client-tls" (include "superbatch.fullname" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "superbatch.tokensSecret" -}}
{{- default (printf "%s-tokens" (include "superbatch.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "superbatch.claim" -}}
{{- default (printf "%s-state" (include "superbatch.fullname" .)) .Values.state.persistence.existingClaim -}}
{{- end -}}

{{/* Every name that the certificate must hold: the coordinator's, and any worker's. */}}
{{- define "superbatch.dnsNames" -}}
{{- $coordinator := include "superbatch.roleName" (list . "coordinator") -}}
{{- $names := list -}}
{{- range $suffix := list "" (printf ".%s" .Release.Namespace) (printf ".%s.svc" .Release.Namespace) (printf ".%s.svc.%s" .Release.Namespace .Values.clusterDomain) -}}
{{- $names = append $names (printf "%s%s" $coordinator $suffix) -}}
{{- end -}}
{{- $names = append $names (include "superbatch.workerTlsName" .) -}}
{{- $names = concat $names (list "localhost") .Values.tls.extraDnsNames -}}
{{- toJson $names -}}
{{- end -}}

{{/* Workers are reached by their addresses, which no certificate can foresee: all are verified by this name. */}}
{{- define "superbatch.workerTlsName" -}}
{{- printf "%s.%s.svc" (include "superbatch.roleName" (list . "worker")) .Release.Namespace -}}
{{- end -}}

{{/* A pod's grace period: the wait before SIGTERM, the server's own drain, 2 s in which the last traces are sent, 2 s in which its runtime ends, and 3 s to spare. (list root role) */}}
{{- define "superbatch.gracePeriod" -}}
{{- add (first .).Values.preStopSeconds (ceil (get (first .).Values (last .)).graceSeconds | int) 7 -}}
{{- end -}}
